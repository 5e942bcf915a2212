"""Modelfiles that write what was trained."""

import re
from datetime import datetime

import pytest

from fastllm.chat_templates import (
    CHAT_TEMPLATES,
    OLLAMA_TEMPLATES,
    construct_chat_template,
    get_chat_template,
    modelfile_of,
)

from . import go_template
from .conftest import RealTokenizers, talk

TALKS = {
    "one question": talk("Hi"),
    "with a system message": talk("Hi", system="Be kind."),
    "several turns": talk("Hi", "Hello", "Bye", "Ciao", "Again"),
    "several turns with a system message": talk("Hi", "Hello", "Bye", system="Be kind."),
}


def template_of(modelfile: str) -> str:
    return re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)[1]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("case", TALKS)
def test_the_modelfile_writes_the_text_that_was_trained(name: str, case: str, toy):
    """Ollama adds the first BOS, and asks for an answer: the text is the template's, with its generation prompt."""
    get_chat_template(toy, name)
    messages = TALKS[case]
    trained = toy.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    today = datetime.now().strftime("%Y-%m-%d")
    written = go_template.render(template_of(toy._ollama_modelfile), messages, today)
    assert written == trained.removeprefix("<s>")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_stop_words_are_the_end_of_turn_and_the_next_question(name: str, toy):
    get_chat_template(toy, name)
    stops = re.findall(r'PARAMETER stop "(.*?)"\n', toy._ollama_modelfile)
    text = toy.apply_chat_template(talk("Hi", "Hello", "Bye", "Ciao"), tokenize=False)
    assert len(stops) == len(set(stops)) > 0
    assert any(stop in text.split("Hello")[1].split("Bye")[0] for stop in stops)
    assert any(stop in text.split("Ciao")[1] for stop in stops)


def test_the_form_of_the_file(toy):
    get_chat_template(toy, "vicuna", system_message="Be brief.")
    lines = toy._ollama_modelfile.splitlines()
    assert lines[0] == "FROM {__FILE_LOCATION__}"
    assert 'PARAMETER stop "</s>"' in lines
    assert "PARAMETER temperature 1.5" in lines and "PARAMETER min_p 0.1" in lines
    assert lines[-1] == 'SYSTEM """Be brief."""'
    assert modelfile_of(toy, location="./model.Q4_K_M.gguf").startswith("FROM ./model.Q4_K_M.gguf\n")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_table_of_modelfiles_leaves_file_and_eos_to_fill_in(name: str, toy):
    assert list(OLLAMA_TEMPLATES) == list(CHAT_TEMPLATES)
    get_chat_template(toy, name, map_eos_token=False)
    filled = OLLAMA_TEMPLATES[name].replace("{__EOS_TOKEN__}", toy.eos_token)
    assert template_of(filled) == template_of(toy._ollama_modelfile)
    assert filled.startswith("FROM {__FILE_LOCATION__}\n")


def test_a_tokenizer_with_a_template_of_its_own(real: RealTokenizers):
    for name in ("qwen2", "phi-3", "gemma-4"):
        tokenizer = real(name)
        messages = TALKS["several turns"]
        trained = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        written = go_template.render(template_of(modelfile_of(tokenizer)), messages)
        assert written == trained.removeprefix(tokenizer.bos_token or "\0"), name


def test_a_template_written_as_text(toy):
    template = "{SYSTEM}\n\nQ: {INPUT}\nA: {OUTPUT}</s>\n\nQ: {INPUT}\nA: {OUTPUT}</s>\n\n"
    modelfile, jinja, _, _ = construct_chat_template(toy, template, default_system_message="Be brief.")
    toy.chat_template = jinja
    for messages in TALKS.values():
        trained = toy.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert go_template.render(template_of(modelfile), messages) == trained.removeprefix("<s>")


def test_braces_of_a_template_are_not_gos(toy):
    get_chat_template(
        toy, ("{% for m in messages %}{{ '{{x}} ' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}", "</s>")
    )
    assert '{{ "{{" }}x}} user: ' in toy._ollama_modelfile


def test_no_template_no_modelfile(toy):
    with pytest.raises(ValueError, match="no chat template"):
        modelfile_of(toy)

"""Templates written as text with {INPUT} and {OUTPUT}."""

import pytest
from datasets import Dataset

from fastllm.chat_templates import apply_chat_template, construct_chat_template
from fastllm.chat_templates import test_construct_chat_template as check

from .conftest import talk

ALPACA = "Below are some tasks.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
WITH_SYSTEM = "{SYSTEM}\n\nQ: {INPUT}\nA: {OUTPUT}</s>\n\nQ: {INPUT}\nA: {OUTPUT}</s>\n\n"


def rendered(tokenizer, jinja: str, messages: list[dict], prompt: bool = False) -> str:
    tokenizer.chat_template = jinja
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_what_repeats_is_found_from_two_turns(toy):
    _, jinja, question, answer = construct_chat_template(toy, WITH_SYSTEM, default_system_message="Be brief.")
    assert (question, answer) == ("Q: ", "\nA: ")
    text = rendered(toy, jinja, talk("Hi", "Hello", "Bye", "Ciao"))
    assert text == "<s>Be brief.\n\nQ: Hi\nA: Hello</s>\n\nQ: Bye\nA: Ciao</s>\n\n"
    assert rendered(toy, jinja, talk("Hi", system="It's me"), prompt=True) == "<s>It's me\n\nQ: Hi\nA: "


def test_one_turn_is_enough_where_its_headings_look_alike(toy, caplog):
    with caplog.at_level("WARNING", "fastllm"):
        _, jinja, question, answer = construct_chat_template(toy, ALPACA)
    assert "'</s>' was added" in caplog.text
    assert (question, answer) == ("\n\n### Instruction:\n", "\n\n### Response:\n")
    assert rendered(toy, jinja, talk("Hi", "Hello", "Bye", "Ciao")) == (
        "<s>Below are some tasks.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
        "\n\n### Instruction:\nBye\n\n### Response:\nCiao</s>"
    )


def test_the_default_is_llama_3(toy):
    toy.eos_token = "<|im_end|>"
    template = "<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>\n" * 2
    modelfile, _, question, answer = construct_chat_template(toy, template)
    assert (question, answer) == ("<|im_start|>user\n", "\n<|im_start|>assistant\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert check(toy)


@pytest.mark.parametrize(
    ("template", "problem"),
    [("{INPUT}", "no {OUTPUT}"), ("{OUTPUT}", "no {INPUT}"), ("{INPUT}{SYSTEM}{OUTPUT}", "comes after"),
     ("Q:{INPUT} A:{OUTPUT}</s>Q:{INPUT} B:{OUTPUT}</s>", "turns differ"),
     ("Q:{INPUT} A:{OUTPUT}</s>P:{INPUT} A:{OUTPUT}</s>", "opens with"),
     ("Q:{INPUT} A:{OUTPUT}</s>Q:{INPUT}", "turns differ")],
)  # fmt: skip
def test_templates_that_cant_be_understood_are_refused(template: str, problem: str, toy):
    with pytest.raises(ValueError, match=problem):
        construct_chat_template(toy, template)


def test_extra_stop_words_must_be_single_tokens(toy):
    modelfile = construct_chat_template(toy, ALPACA, extra_eos_tokens=["<|im_end|>"])[0]
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    with pytest.raises(ValueError, match="not a single token"):
        construct_chat_template(toy, ALPACA, extra_eos_tokens=["### Response"])


def test_a_data_set_gets_its_text_and_the_tokenizer_the_template(toy):
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}] * 2
    data = apply_chat_template(Dataset.from_list(rows), tokenizer=toy, chat_template=ALPACA)
    expected = "<s>Below are some tasks.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
    assert data["text"] == [expected] * 2
    assert data.column_names == ["conversations", "text"]
    assert toy.apply_chat_template(talk("Hi", "Hello"), tokenize=False) == expected
    assert (toy._unsloth_input_part, toy._unsloth_output_part) == ("\n\n### Instruction:\n", "\n\n### Response:\n")
    assert toy._ollama_modelfile.startswith("FROM {__FILE_LOCATION__}")


def test_a_row_that_cant_be_rendered_is_named(toy):
    rows = [{"conversations": talk("Hi", "Hello")}, {"conversations": talk("Hi", system="no place for me")}]
    with pytest.raises(ValueError, match="row 1"):
        apply_chat_template(rows, tokenizer=toy, chat_template=ALPACA)

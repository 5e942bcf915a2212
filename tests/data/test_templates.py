"""The table of templates and what they render, byte for byte."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastllm import chat_templates
from fastllm.chat_templates import CHAT_TEMPLATES, DEFAULT_SYSTEM_MESSAGE, get_chat_template
from fastllm.chat_templates import test_chat_templates as check_chat_templates
from fastllm.text.rendering import ChatRenderer
from fastllm.text.sandbox import TemplateError
from fastllm.text.templates import SHIPPED, is_known, is_shipped, with_system_message

from .conftest import RealTokenizers, talk

GOLDEN = json.loads((Path(__file__).parent / "golden_renderings.json").read_text(encoding="utf-8"))

FIRST_NAMES = (
    "unsloth zephyr chatml mistral llama vicuna vicuna_old,vicuna old,alpaca gemma gemma_chatml gemma2 gemma2_chatml "
    "llama-3 llama3 phi-3 phi-35 phi-3.5 llama-3.1 llama-31 llama-3.2 llama-3.3 llama-32 llama-33 qwen-2.5 qwen-25 "
    "qwen25 qwen2.5 phi-4 gemma-3 gemma3"
)
NEWER_NAMES = (
    "qwen-3 qwen3 gemma-3n gemma3n gemma-4 gemma4 gemma-4-thinking gemma4-thinking gpt-oss gptoss qwen3-instruct "
    "qwen3-thinking lfm-2 lfm-2.5 starling yi-chat"
)
SPELLINGS = "qwen-2.5-coder qwen-25-coder qwen2.5-coder qwen25-coder mixtral"


class Tokens:
    """Special tokens with names that no template contains."""

    name_or_path = "golden"
    special_tokens_map = {"bos_token": "<BOS>", "eos_token": "<EOS>", "unk_token": "<UNK>"}


def renderer(name: str, **variables) -> ChatRenderer:
    jinja = with_system_message(CHAT_TEMPLATES[name][0], DEFAULT_SYSTEM_MESSAGE[name])
    return ChatRenderer(Tokens(), jinja, **variables)


def test_all_names_are_there_in_the_documented_order():
    mission = [name for part in FIRST_NAMES.split(",") for name in ([part] if part == "vicuna old" else part.split())]
    assert len(mission) == 31
    assert list(CHAT_TEMPLATES) == [*mission, *NEWER_NAMES.split(), *SPELLINGS.split()]
    assert list(DEFAULT_SYSTEM_MESSAGE) == list(CHAT_TEMPLATES)


def test_an_entry_is_template_stop_word_flag_and_modelfile():
    jinja, stop_word, maps_eos, modelfile = CHAT_TEMPLATES["chatml"]
    assert "<|im_start|>" in jinja
    assert (stop_word, maps_eos) == ("<|im_end|>", True)
    assert modelfile.startswith("FROM {__FILE_LOCATION__}")
    assert {name for name in CHAT_TEMPLATES if CHAT_TEMPLATES[name][2]} == {
        "chatml", "gemma", "gemma2", "gemma_chatml", "gemma2_chatml"
    }  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN["renderings"])
def test_renderings_are_the_golden_ones_byte_for_byte(name: str):
    for case, expected in GOLDEN["renderings"][name].items():
        arguments = dict(GOLDEN["cases"][case])
        messages, tools = arguments.pop("messages"), arguments.pop("tools", None)
        prompt = arguments.pop("add_generation_prompt", False)
        assert renderer(name, **arguments).render(messages, tools, prompt) == expected, case


@pytest.mark.parametrize(
    ("alias", "name"),
    [("vicuna old", "vicuna_old"), ("gemma2", "gemma"), ("gemma2_chatml", "gemma_chatml"), ("llama3", "llama-3"),
     ("phi-3.5", "phi-3"), ("llama-33", "llama-3.1"), ("qwen25", "qwen-2.5"), ("qwen2.5-coder", "qwen-2.5"),
     ("gemma3", "gemma-3"), ("qwen3", "qwen-3"), ("gptoss", "gpt-oss"), ("mixtral", "mistral")],
)  # fmt: skip
def test_aliases_are_the_same_template(alias: str, name: str):
    assert CHAT_TEMPLATES[alias] == CHAT_TEMPLATES[name]


OFFICIAL = {
    "gemma-3": "gemma3", "llama-3": "llama3", "qwen-2.5": "qwen2_5", "qwen-3": "qwen3", "gemma-4": "gemma4_v5",
    "lfm-2": "lfm2",
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_renderings_are_those_of_the_publishers_templates_that_trl_keeps(name: str):
    import trl

    source = Path(trl.__file__).parent / "chat_templates" / f"{OFFICIAL[name]}.jinja"
    if not source.exists():
        pytest.skip(f"this version of trl has no {source.name}")
    official = ChatRenderer(Tokens(), source.read_text(encoding="utf-8"))
    for case in ("one", "multi", "system_multi", "prompt", "prompt_multi", "empty_assistant", "unicode"):
        arguments = GOLDEN["cases"][case]
        messages, prompt = arguments["messages"], arguments.get("add_generation_prompt", False)
        assert renderer(name).render(messages, None, prompt) == official.render(messages, None, prompt), case


def test_gpt_oss_writes_channels_tools_and_the_date_of_today():
    from datetime import datetime

    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
        "type": "object", "properties": {"a": {"type": "number"}, "unit": {"type": "string", "enum": ["m", "km"]}},
        "required": ["a"]}}}  # fmt: skip
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    messages = [*talk("Add 1", system="Be brief."), call, {"role": "tool", "content": "2"}, *talk("", "Two.")[1:]]
    assert renderer("gpt-oss").render(messages, [tool]) == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        f"Knowledge cutoff: 2024-06\nCurrent date: {datetime.now():%Y-%m-%d}\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.\n"
        "Calls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n"
        "# Tools\n\n## functions\n\nnamespace functions {\n\n"
        '// Adds.\ntype add = (_: {\na: number,\nunit?: "m" | "km",\n}) => any;\n\n} // namespace functions<|end|>'
        "<|start|>user<|message|>Add 1<|end|>"
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>2<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Two.<|return|>"
    )


def test_gemma_4_keeps_a_tools_result_inside_the_turn():
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "sky", "arguments": {"city": "Rome", "days": 2}}}],
    }
    result = {"role": "tool", "name": "sky", "content": "clear"}
    text = renderer("gemma-4").render([*talk("Sky?"), call, result, {"role": "assistant", "content": "Clear."}])
    assert text == (
        "<BOS><|turn>user\nSky?<turn|>\n<|turn>model\n"
        '<|tool_call>call:sky{city:<|"|>Rome<|"|>,days:2}<tool_call|>'
        '<|tool_response>response:sky{value:<|"|>clear<|"|>}<tool_response|>Clear.<turn|>\n'
    )
    assert (
        renderer("gemma-4-thinking")
        .render(talk("Hi"), None, True)
        .endswith("<|turn>model\n<|channel>thought\n<channel|>")
    )


SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_no_template_renders_rows_of_other_keys_to_nothing(name: str):
    with pytest.raises(TemplateError):
        renderer(name).render(SHAREGPT)


@pytest.mark.parametrize("name", ["llama", "gemma", "llama-3", "qwen3-instruct"])
def test_no_template_writes_pythons_notation_of_a_list(name: str):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert "'type'" not in renderer(name).render(parts)
    with pytest.raises(TemplateError, match="must be text"):
        renderer(name).render_prepared(parts)


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [("llama-3.1", "llama-bpe"), ("llama", "llama-spm"), ("phi-3", "phi-3"), ("qwen-2.5", "qwen2"),
     ("chatml", "qwen35"), ("gemma-4", "gemma-4"), ("alpaca", "gpt-2"), ("vicuna", "deepseek-llm"),
     ("zephyr", "starcoder")],
)  # fmt: skip
def test_tokens_are_those_of_apply_chat_template(name: str, vocabulary: str, real: RealTokenizers):
    from fastllm.data import RowEncoder

    tokenizer = get_chat_template(real(vocabulary), name, map_eos_token=False)
    talks = [
        talk("Hi", "Hello"),
        talk("Hi", "", "Bye", "Ciao"),
        talk(" Ünïcode 🎉 \n", "日本語\n\n", system="Be kind."),
    ]
    for messages in talks:
        row = RowEncoder(tokenizer).encode([{"messages": messages}])[0]
        assert row.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]


def test_shipped_templates_are_known_whatever_their_system_message():
    for name, shipped in SHIPPED.items():
        assert is_shipped(shipped.jinja), name
        assert is_shipped(with_system_message(shipped.jinja, 'It\'s "your" turn\nnow \\ {{ bos_token }} %}')), name
    jinja = SHIPPED["unsloth"].jinja
    assert not is_shipped(jinja.replace("{system_message}", "' + range(9) | string + '"))
    assert not is_shipped("{{ messages }}") and not is_known("{{ messages }}")


def test_a_system_message_is_rendered_as_it_was_written():
    message = 'It\'s "quoted"\nover \\n lines, {{ braces }} and {% blocks %} 🎉'
    jinja = with_system_message(SHIPPED["vicuna"].jinja, message)
    assert ChatRenderer(Tokens(), jinja).render(talk("Hi")) == f"<BOS>{message} USER: Hi "


def test_the_table_takes_templates_of_ones_own():
    CHAT_TEMPLATES["mine"] = ("{{ messages[0]['content'] }}", "eos_token", False, "")
    try:
        assert CHAT_TEMPLATES["mine"][0] == "{{ messages[0]['content'] }}"
        assert "mine" in list(CHAT_TEMPLATES)
    finally:
        del CHAT_TEMPLATES["mine"]


def test_the_self_check_passes():
    assert check_chat_templates()


def test_the_vocabulary_of_a_gguf_file_is_compared(toy, monkeypatch):
    class Llama:
        """`llama_cpp.Llama` with this tokenizer's vocabulary; another one where the file says so."""

        def __init__(self, path: str, vocab_only: bool, verbose: bool) -> None:
            self.shift = path.startswith("other")

        def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
            ids = toy(text.decode(), add_special_tokens=add_bos)["input_ids"]
            return [*ids[:3], ids[3] + self.shift, *ids[4:]]

    get_chat_template(toy, "chatml")
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    assert chat_templates.test_hf_gguf_equivalence(toy, "model.gguf")
    with pytest.raises(ValueError, match=r"other\.gguf: token 3 is"):
        chat_templates.test_hf_gguf_equivalence(toy, "other.gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ImportError, match="pip install llama-cpp-python"):
        chat_templates.test_hf_gguf_equivalence(toy)


def test_importing_stays_quick_and_loads_no_heavy_package():
    import subprocess
    import sys

    code = (
        "import sys, time; start = time.perf_counter(); import fastllm.chat_templates, fastllm.data; "
        "took = time.perf_counter() - start; "
        "print(took, [name for name in ('torch', 'transformers', 'datasets', 'jinja2') if name in sys.modules])"
    )
    took, _, loaded = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        .stdout.strip()
        .partition(" ")
    )
    assert loaded == "[]"
    assert float(took) < 0.3

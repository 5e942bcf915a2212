"""Answers found from the template: any template, many turns, tools, thinking, and questions that look like answers."""

from pathlib import Path

import pytest

from fastllm.chat_templates import CHAT_TEMPLATES
from fastllm.data import ResponseFinder
from fastllm.text.rendering import ChatRenderer
from fastllm.text.sandbox import TemplateError

from .conftest import talk
from .test_templates import Tokens, renderer

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "sky", "arguments": {"city": "Rome"}}}],
}
RESULT = {"role": "tool", "name": "sky", "content": "clear"}


def answers(found) -> list[str]:
    return [found.text[span.start : span.end] for span in found.spans]


def find(name: str, messages: list[dict], **variables) -> list[str]:
    return answers(ResponseFinder(renderer(name, **variables)).find(messages))


EXPECTED = {
    "unsloth": ["One<EOS>", "Two<EOS>"],
    "mistral": ["One<EOS>", "Two<EOS>"],
    "llama": [" One <EOS>", " Two <EOS>"],
    "vicuna": [" One<EOS>", " Two<EOS>"],
    "alpaca": ["One<EOS>", "Two<EOS>"],
    "gemma": ["One<end_of_turn>", "Two<end_of_turn>"],
    "llama-3.1": ["One<|eot_id|>", "Two<|eot_id|>"],
    "phi-3": ["One<|end|>", "Two<|end|>"],
    "phi-4": ["One<|im_end|>", "Two<|im_end|>"],
    "qwen-2.5": ["One<|im_end|>", "Two<|im_end|>"],
    "qwen-3": ["One<|im_end|>", "<think>\n\n</think>\n\nTwo<|im_end|>"],
    "gemma-4": ["One<turn|>", "Two<turn|>"],
    "gpt-oss": ["<|channel|>final<|message|>One<|end|>", "<|channel|>final<|message|>Two<|return|>"],
    "starling": [" One<|end_of_turn|>", " Two<|end_of_turn|>"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_answers_run_from_the_generation_prompt_to_the_end_of_turn(name: str):
    assert find(name, talk("Q1", "One", "Q2", "Two")) == EXPECTED[name]


def all_templates() -> list[tuple[str, str]]:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    ours = [(name, renderer(name).source) for name in CHAT_TEMPLATES]
    return ours + [(path.stem, path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.jinja"))]


@pytest.mark.parametrize(("name", "source"), all_templates(), ids=lambda value: value if len(value) < 40 else "")
def test_every_template_gives_up_its_answers_and_nothing_else(name: str, source: str):
    finder = ResponseFinder(ChatRenderer(Tokens(), source))
    messages = talk(
        "first question", "first answer", "second question", " second\nanswer \n", "third question", "third!"
    )
    found = finder.find(messages)
    trained = answers(found)
    assert len(trained) == 3
    for text, message in zip(trained, messages[1::2], strict=True):
        assert message["content"].strip() in text
        assert not any(asked["content"] in text for asked in messages[::2])
        assert text == text.rstrip() or text.strip() == message["content"].strip()
    assert not found.vanished


def test_the_end_of_turn_is_trained_in_every_shipped_template():
    for name in CHAT_TEMPLATES:
        finder = ResponseFinder(renderer(name))
        assert finder.ending.strip(), name
        assert answers(finder.find(talk("Q", "A")))[0].endswith(finder.last_ending.strip())


@pytest.mark.parametrize("name", ["chatml", "llama-3", "qwen-3", "gemma", "mistral", "alpaca", "gpt-oss"])
def test_a_message_that_looks_like_an_answer_is_not_taken_for_one(name: str):
    """Whatever opens or ends an answer may be quoted in a question, or in an answer."""
    trap = renderer(name).render(talk("trap question", "trap answer", "trap question", "trap answer"))
    quoted = "" if "</think>" in trap else trap  # qwen-3 drops what stands before </think> from answers
    trained = find(name, talk(trap, "real answer" + quoted, trap, "last answer"))
    assert len(trained) == 2
    assert "real answer" in trained[0]
    assert trained[0].count("trap answer") == quoted.count("trap answer")
    assert "trap" not in trained[1]
    assert "last answer" in trained[1]


@pytest.mark.parametrize("content", [" Hello\n", "\n\nHello", "Hello \t", "\u3000Hello\u3000", "H", "🎉"])
def test_white_space_around_an_answer_is_trained_as_the_template_writes_it(content: str):
    assert find("chatml", talk("Q", content)) == [content + "<|im_end|>"]
    assert find("gemma", talk("Q", content)) == [content.strip() + "<end_of_turn>"]


@pytest.mark.parametrize(
    ("name", "call"),
    [("qwen-2.5", '<tool_call>\n{"name": "sky", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'),
     ("llama-3.1", '{"name": "sky", "parameters": {"city": "Rome"}}<|eot_id|>'),
     ("gpt-oss", ' to=functions.sky<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'),
     ("gemma-4", '<|tool_call>call:sky{city:<|"|>Rome<|"|>}<tool_call|><|tool_response>')],
)  # fmt: skip
def test_tool_calls_are_trained_and_results_are_not(name: str, call: str):
    trained = find(name, [*talk("Sky?"), CALL, RESULT, {"role": "assistant", "content": "Clear."}])
    assert trained[0].strip("\n") == call
    assert "clear" not in "".join(trained)
    assert "Clear." in trained[1]


def test_a_call_without_any_text_of_its_own_is_trained():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {"zone": 2}}}]}
    trained = find("qwen-2.5", [*talk("Time?"), call, RESULT, {"role": "assistant", "content": "Noon."}])
    assert trained == [
        '\n<tool_call>\n{"name": "now", "arguments": {"zone": 2}}\n</tool_call><|im_end|>'.lstrip("\n"),
        "Noon.<|im_end|>",
    ]


def test_thinking_is_trained_where_the_template_shows_it():
    messages = talk("Q1", "<think>\nfirst\n</think>\n\nOne", "Q2", "<think>\nsecond\n</think>\n\nTwo")
    assert find("qwen-3", messages) == ["One<|im_end|>", "<think>\nsecond\n</think>\n\nTwo<|im_end|>"]
    reasoning = [*talk("Q"), {"role": "assistant", "reasoning_content": "because", "content": "A"}]
    assert find("qwen-3", reasoning) == ["<think>\nbecause\n</think>\n\nA<|im_end|>"]
    assert find("gemma-4", reasoning) == ["<|channel>thought\nbecause\n<channel|>A<turn|>"]
    assert find("gpt-oss", reasoning) == [
        "<|channel|>analysis<|message|>because<|end|><|start|>assistant<|channel|>final<|message|>A<|return|>"
    ]


def test_a_template_that_looks_at_the_letters_of_a_message_is_served():
    """Marks at the ends of a message would change these; marks in its middle don't."""
    source = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{{ '[greeting]' if m['content'].startswith('Hello') else '' }}{{ m['content'] }}"
        "{{ '!' if m['content'].endswith('there') else '' }}<|end|>{% endfor %}"
    )
    finder = ResponseFinder(ChatRenderer(Tokens(), source))
    assert answers(finder.find(talk("Hello you there", "Hello there", "Bye", "Hello again"))) == [
        "[greeting]Hello there!<|end|>", "[greeting]Hello again<|end|>",
    ]  # fmt: skip


def test_messages_that_the_template_leaves_out_are_reported():
    messages = [*talk("Q"), {"role": "critic", "content": "Hm"}, {"role": "assistant", "content": "A"}]
    assert ResponseFinder(renderer("phi-4")).find(messages).vanished == [1]


def test_empty_answers_have_no_span():
    found = ResponseFinder(renderer("chatml")).find(talk("Q", "", "Q2", "A"))
    assert answers(found) == ["A<|im_end|>"]
    assert not found.vanished


def test_a_template_without_an_end_of_turn_trains_the_answer_alone():
    source = "{% for m in messages %}{{ '\n### ' + m['role'] + ': ' + m['content'] }}{% endfor %}"
    finder = ResponseFinder(ChatRenderer(Tokens(), source))
    assert finder.ending == ""
    assert answers(finder.find(talk("Q", "One", "Q2", "Two"))) == [" One", " Two"]


def test_a_template_that_shows_no_conversation_is_refused():
    with pytest.raises(TemplateError, match="in their order"):
        ResponseFinder(ChatRenderer(Tokens(), "{{ messages[-1]['content'] }}"))


def test_content_of_parts_is_found_too():
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
             {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]}]  # fmt: skip
    assert find("gemma-3", parts) == ["A cat<end_of_turn>"]
    with pytest.raises(ValueError, match="takes text only"):
        find("chatml", parts)

"""Checks that users may run on their own machine and tokenizer."""

from __future__ import annotations

from typing import Any

from .._errors import MissingPackageError, TokenizerError
from .plain_template import LLAMA_3, construct_chat_template
from .rendering import ChatRenderer
from .response_spans import ResponseFinder
from .templates import DEFAULT_SYSTEM_MESSAGE, SHIPPED, with_system_message

_TALK = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It's 4."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
]


class _Tokens:
    """The part of a tokenizer that templates read."""

    name_or_path = "self-check"
    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_chat_templates() -> bool:
    """Render a conversation with every template and find its answers. Raises where one is lost; returns True."""
    for name, shipped in SHIPPED.items():
        source = with_system_message(shipped.jinja, DEFAULT_SYSTEM_MESSAGE[name])
        found = ResponseFinder(ChatRenderer(_Tokens(), source)).find(_TALK)
        answers = [found.text[span.start : span.end] for span in found.spans]
        if len(answers) != 2 or "It's 4." not in answers[0] or "6" not in answers[1]:
            raise TokenizerError(f"the answers are not found, only {answers}", where=f"template {name!r}")
    return True


def test_construct_chat_template(tokenizer: Any) -> bool:
    """Build the Llama-3 template from text and render with it. Raises where a message is lost; returns True."""
    _, jinja, _, _ = construct_chat_template(tokenizer, LLAMA_3)
    text = ChatRenderer(tokenizer, jinja).render(_TALK)
    lost = [message["content"] for message in _TALK if message["content"] not in text]
    if lost:
        raise TokenizerError(f"messages are lost: {lost}", where="construct_chat_template")
    return True


def test_hf_gguf_equivalence(tokenizer: Any, gguf_model: str = "./model-unsloth.F16.gguf") -> bool:
    """Compare the tokens that `tokenizer` and the vocabulary of a GGUF file give a conversation.

    Needs the `llama-cpp-python` package. Raises `TokenizerError` with the first difference; returns True.
    """
    try:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(
            "llama-cpp-python reads GGUF vocabularies",
            where="test_hf_gguf_equivalence",
            fix="pip install llama-cpp-python",
        ) from error
    text = ChatRenderer(tokenizer).render(_TALK)
    ours = tokenizer(text, add_special_tokens=False)["input_ids"]
    theirs = Llama(gguf_model, vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=False, special=True)
    if ours != theirs:
        at = next(i for i, pair in enumerate(zip([*ours, -1], [*theirs, -2], strict=False)) if pair[0] != pair[1])
        raise TokenizerError(
            f"token {at} is {ours[at : at + 1]} here and {theirs[at : at + 1]} there", where=gguf_model
        )
    return True

"""Conversations to text: the chat template of one tokenizer, ready to render row after row."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._errors import DataError, TokenizerError
from .sandbox import TemplateError, compile_template, plain
from .templates import is_known

Message = dict[str, Any]

# names under which data sets keep a message's reasoning; templates read the first, that of gpt-oss the second
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_PROBE = "content-of-a-message"


def tokenizer_of(tokenizer: Any) -> Any:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", None) or tokenizer


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS token before plain text."""
    core = tokenizer_of(tokenizer)
    bos = getattr(core, "bos_token_id", None)
    return bos is not None and core("a")["input_ids"][:1] == [bos]


class ChatRenderer:
    """Renders with `tokenizer`'s chat template, as `tokenizer.apply_chat_template(tokenize=False)` does.

    `template_kwargs` are further variables of the template, for instance `enable_thinking=False`.
    Errors: `TokenizerError` without a chat template, `TemplateError` where the template refuses a conversation.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, **template_kwargs: Any) -> None:
        template = chat_template or getattr(tokenizer, "chat_template", None)
        tokenizer = tokenizer_of(tokenizer)
        template = template or getattr(tokenizer, "chat_template", None)
        if not template:
            raise TokenizerError(
                "the tokenizer has no chat template",
                where=getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
                fix='tokenizer = get_chat_template(tokenizer, "chatml")',
            )
        self._named = template if isinstance(template, dict) else {"default": template}
        self._roles: dict[str, bool] = {}
        self._constants = {**getattr(tokenizer, "special_tokens_map", {}), **template_kwargs}

    @property
    def source(self) -> str:
        """The template that plain conversations are rendered with."""
        return self._named.get("default") or next(iter(self._named.values()))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of one conversation."""
        return self.render_prepared(self.prepare(messages), as_schemas(tools), add_generation_prompt)

    def render_prepared(
        self, messages: list[Message], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """`render` for messages that `prepare` has seen."""
        source = self._named["tool_use"] if tools and "tool_use" in self._named else self.source
        variables = {
            "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        return compile_template(source, is_known(source)).render({**variables, **self._constants})

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation as templates expect it: JSON types, no empty keys, reasoning under its usual names."""
        if not messages:
            raise DataError("the conversation has no messages")
        prepared = [_prepared(message) for message in messages]
        if any(isinstance(message.get("content"), list) for message in prepared):
            return [m if self._takes_parts_of(m.get("role")) else _with_flat_content(m) for m in prepared]
        if self.takes_text:
            return prepared
        return [_with_parts(m) if self._takes_parts_of(m.get("role")) else m for m in prepared]

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template renders content that is a list of parts, as templates of vision models do."""
        return self._shows(_said("user", parts=True))

    def _takes_parts_of(self, role: Any) -> bool:
        """The same of one role: some templates take parts of the user only, and print or refuse those of others."""
        if role not in ("system", "assistant") or not self.takes_parts:
            return self.takes_parts
        if role not in self._roles:
            said, asked = _said(role, parts=True), {"role": "user", "content": [{"type": "text", "text": "why"}]}
            self._roles[role] = self._shows(asked, said) if role == "assistant" else self._shows(said, asked)
        return self._roles[role]

    @functools.cached_property
    def takes_text(self) -> bool:
        """Whether the template renders content that is text. Some of vision models render parts only."""
        return self._shows(_said("user", parts=False)) or not self.takes_parts

    def _shows(self, *messages: Message) -> bool:
        try:
            text = self.render_prepared(list(messages))
        except TemplateError:
            return False
        return _PROBE in text and not re.search(r"""['"]text['"]""", text)


def as_schemas(tools: Sequence[Any] | None) -> list[dict] | None:
    """Tools as JSON schemas; a Python function is described from its type hints and docstring."""
    if not tools:
        return None
    schemas = []
    for tool in tools:
        if callable(tool):
            from transformers.utils import get_json_schema

            tool = get_json_schema(tool)
        schemas.append(plain(tool))
    return schemas


def _prepared(message: Message) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"a message must be a dict with role and content, not {type(message).__name__}")
    if len(message) == 2 and type(message.get("role")) is str and type(message.get("content")) is str:
        return message
    kept = {key: plain(value) for key, value in message.items() if value is not None}
    if kept.get("tool_calls") == []:
        del kept["tool_calls"]
    reasoning = next((kept[key] for key in REASONING_KEYS if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _with_flat_content(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    kinds = {part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content}
    if kinds - {"text"}:
        raise DataError(
            f"this template takes text only, and a {message.get('role')} message has {sorted(map(str, kinds))} parts"
        )
    return {**message, "content": "\n".join(str(part.get("text", "")) for part in content)}


def _said(role: str, parts: bool) -> Message:
    return {"role": role, "content": [{"type": "text", "text": _PROBE}] if parts else _PROBE}


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to every string in it, keys aside."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_text(item, change) for item in value]
    return value


def texts_in(value: Any) -> Iterable[str]:
    """Every string in `value`, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)

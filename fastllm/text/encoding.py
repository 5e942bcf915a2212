"""Rows to token ids and labels, a batch at a time.

`labels` is `input_ids` where the loss is taken and -100 elsewhere, as every transformers trainer reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from .._errors import ArgumentError, DataError, TokenizerError
from .formats import messages_of, without_nulls
from .rendering import ChatRenderer, Message, adds_bos, tokenizer_of
from .response_spans import Rendered, ResponseFinder, Span
from .sources import or_error

IGNORED = -100
TrainOn = Literal["responses", "last", "marked", "all"]


class EncodedRow(NamedTuple):
    """Token ids `[n]` of a row and its labels `[n]`, with what happened to it on the way."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    vanished: tuple[str, ...] = ()


@dataclass
class RowText:
    """The text of a row and the stretches of it that are trained."""

    text: str
    spans: list[Span]
    vanished: tuple[str, ...] = ()


@dataclass
class RowEncoder:
    """Turns rows of messages, prompt and completion, or text into token ids and labels.

    `train_on` says which tokens carry loss: `"responses"` of the assistant, the `"last"` of them, those `"marked"` by
    `"train": True` in their message (or `"weight": 1`), or `"all"` tokens. Rows longer than `max_length` tokens are cut
    at the end.

    Errors: `DataError` with the row's problem. `encode` takes row numbers to name them.
    """

    tokenizer: Any
    train_on: TrainOn = "responses"
    max_length: int | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.train_on not in get_args(TrainOn):
            raise ArgumentError(
                f"train_on={self.train_on!r}",
                where="train_on",
                fix=f"train_on is one of {', '.join(get_args(TrainOn))}",
            )
        self._core = tokenizer_of(self.tokenizer)
        self._finders: dict[str, ResponseFinder] = {}

    def encode(
        self, rows: Sequence[dict[str, Any]], numbers: Sequence[int] | None = None
    ) -> list[EncodedRow | DataError]:
        """One `EncodedRow`, or the error that a row can't be trained on, for each of `rows`."""
        numbers = numbers if numbers is not None else range(len(rows))
        texts = [or_error(self._encodable_text, row, number) for row, number in zip(rows, numbers, strict=True)]
        usable = [text for text in texts if isinstance(text, RowText)]
        encodings = iter(self._encode_texts([text.text for text in usable]))
        return [text if isinstance(text, DataError) else self._labelled(text, next(encodings)) for text in texts]

    def _encodable_text(self, row: dict[str, Any]) -> RowText:
        return _encodable(self.text_of(row))

    def text_of(self, row: dict[str, Any]) -> RowText:
        """The row as text, with the spans to train."""
        if "prompt" in row and "completion" in row:
            return self._prompt_and_completion(row["prompt"], row["completion"], row)
        if isinstance(row.get("text"), str):
            return self._plain_text(row["text"])
        messages = messages_of(row)
        return self._conversation(messages, row, self._selected(messages))

    def _conversation(self, messages: list[Message], row: dict[str, Any], selected: Callable[[int], bool]) -> RowText:
        found = self.finder(row.get("chat_template_kwargs")).find(messages, tools_of(row))
        spans = [span for span in found.spans if selected(span.message)]
        if self.train_on == "all":
            spans = [Span(0, len(found.text), 0)]
        elif self.train_on == "last":
            last = max((span.message for span in spans), default=-1)
            spans = [span for span in spans if span.message == last]
        return RowText(found.text, spans, _roles(found, messages))

    def _selected(self, messages: list[Message]) -> Callable[[int], bool]:
        return lambda number: is_trained(messages[number], unmarked=self.train_on != "marked")

    def _prompt_and_completion(self, prompt: Any, completion: Any, row: dict[str, Any]) -> RowText:
        if isinstance(prompt, list) and isinstance(completion, list):
            messages = messages_of({"messages": prompt + completion})
            return self._conversation(messages, row, lambda number: number >= len(prompt))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise DataError("prompt and completion must both be text or both be messages")
        start = self._plain_text(prompt, end=False).text
        text = start + self._ended(completion)
        return RowText(text, [Span(0 if self.train_on == "all" else len(start), len(text), 0)])

    def _plain_text(self, text: str, end: bool = True) -> RowText:
        """Text with exactly one BOS, where the tokenizer puts one before text, and one EOS."""
        bos = getattr(self._core, "bos_token", None) if self._adds_bos else None
        text = (bos or "") + (text.removeprefix(bos) if bos else text)
        text = self._ended(text) if end else text
        return RowText(text, [Span(0, len(text), 0)])

    def _ended(self, text: str) -> str:
        eos = getattr(self._core, "eos_token", None) or ""
        return text if text.rstrip().endswith(eos) else text + eos

    @cached_property
    def _adds_bos(self) -> bool:
        return adds_bos(self._core)

    def finder(self, extra: Any = None) -> ResponseFinder:
        """What renders conversations and finds their answers; `extra` is a row's `chat_template_kwargs`."""
        extra = json.loads(extra) if isinstance(extra, str) else without_nulls(extra or {})
        key = json.dumps(extra, sort_keys=True, default=str) if extra else ""
        if key not in self._finders:
            renderer = ChatRenderer(self.tokenizer, self.chat_template, **{**self.template_kwargs, **extra})
            self._finders[key] = ResponseFinder(renderer)
        return self._finders[key]

    def _encode_texts(self, texts: list[str]) -> list[Any]:
        backend = getattr(self._core, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(
                f"{type(self._core).__name__} has no fast backend, which tells which characters a token covers",
                fix="AutoTokenizer.from_pretrained(name, use_fast=True)",
            )
        backend.no_truncation()
        backend.no_padding()
        return backend.encode_batch(texts, add_special_tokens=False)

    def _labelled(self, row: RowText, encoding: Any) -> EncodedRow:
        ids = encoding.ids
        labels = [IGNORED] * len(ids)
        for span in row.spans:
            start, end = token_range(encoding, span.start, span.end, len(row.text))
            labels[start:end] = ids[start:end]
        limit = self.max_length
        cut = limit is not None and len(ids) > limit
        return EncodedRow(ids[:limit], labels[:limit], cut, row.vanished)


def token_range(encoding: Any, start: int, end: int, length: int) -> tuple[int, int]:
    """The tokens that cover any of the characters `start` to `end` of a text of `length` characters.

    A token across the border belongs to the answer: the model has to produce it to produce the answer's first letter.
    """
    first = _token_at(encoding, start, end)
    if first is None:
        return 0, 0
    after = _token_at(encoding, end, length)
    if after is None:
        return first, len(encoding.ids)
    return first, after + (encoding.token_to_chars(after)[0] < end)


def _token_at(encoding: Any, position: int, limit: int) -> int | None:
    """The first token at or after the character `position`: some tokenizers leave white space to no token."""
    while position < limit:
        token = encoding.char_to_token(position)
        if token is not None:
            return token
        position += 1
    return None


def _roles(found: Rendered, messages: list[Message]) -> tuple[str, ...]:
    return tuple(str(messages[number].get("role")) for number in found.vanished)


def is_trained(message: Message, unmarked: bool = True) -> bool:
    """Whether a message is trained: what its `train` or `weight` says, `unmarked` where it has neither."""
    return bool(message.get("train", message.get("weight", unmarked)))


def tools_of(row: Mapping[str, Any]) -> Any:
    """The row's tools, as a list or as JSON text."""
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None


def _encodable(row: RowText) -> RowText:
    if not row.text.strip():
        raise DataError("the row renders to no text at all")
    if not row.text.isascii():
        try:
            row.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text has half a surrogate pair at character {error.start}") from error
    return row

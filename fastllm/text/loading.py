"""`load_chat_data`: whatever holds training data, in one call, with a word on what was found."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._errors import ArgumentError, DataError, nearest
from .._notices import notice
from .formats import CONVERSATION_COLUMNS, FORMATS, canonical, columns_read, conversation_column, detect_format
from .sources import (
    OnError,
    Row,
    as_rows,
    batches_of,
    change_rows,
    check_choice,
    column_names,
    first_row,
    is_dataset,
    is_stream,
    like,
    open_rows,
    or_error,
    settle,
)

_JSON_COLUMNS = ("tools", "chat_template_kwargs")
_EXAMPLE = 300  # characters of a text in the example that is shown


def load_chat_data(
    path_or_dataset: Any,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    streaming: bool = False,
    on_error: OnError = "raise",
    tokenizer: Any = None,
    show: bool = True,
) -> Any:
    """Training data from a file, a folder, the hub, a data set, a stream, a table or rows, in the form trainers take.

    Files may be JSON, JSONL, CSV, TSV, Parquet or plain text. The format is detected (text, Alpaca, ShareGPT, messages,
    prompt-completion, preference pairs, KTO rows; see `fastllm.text.formats`) and told with one example and the columns
    that are not used; with a `tokenizer` the example shows which tokens are trained. `format` names it instead.
    `columns` renames columns first: `{"frage": "instruction"}`. `streaming` reads rows as they are needed, in constant
    memory.

        data = load_chat_data("chats.jsonl", tokenizer=tokenizer)

    The result holds `messages`, `text`, `prompt`/`completion` or `chosen`/`rejected`: a `Dataset`, or an
    `IterableDataset` for a stream. Preference pairs and KTO rows are checked here and trained by TRL's trainers.

    Errors: `DataError` for rows that can't be used, naming the first few; with `on_error="drop"` those are left out,
    counted and told.
    """
    check_choice("on_error", on_error, ("raise", "drop"))
    if format is not None and format not in FORMATS:
        raise ArgumentError(f"no format is called {format!r} {nearest(format, FORMATS)}".rstrip(), where="format",
                            fix=f"one of {', '.join(FORMATS)}")  # fmt: skip
    named = isinstance(path_or_dataset, (str, Path))
    data = open_rows(path_or_dataset, split=split, streaming=streaming) if named else as_rows(path_or_dataset)
    if isinstance(data, Iterator):
        data = list(data)
    if isinstance(data, Mapping):
        options: dict[str, Any] = {"format": format, "columns": columns, "streaming": streaming, "on_error": on_error}
        loaded = {name: load_chat_data(part, **options, tokenizer=tokenizer, show=show) for name, part in data.items()}
        return like(data, loaded)
    renamed = dict(columns or {})
    first = _opened(first_row(data), renamed)
    found = format or detect_format(_names(data, renamed), first)
    change = _Canonical(found, renamed, on_error)
    result = _changed(data, change, streaming)
    if not is_stream(result) and not len(result):
        raise DataError(
            f"no row is left; {len(change.dropped)} could not be used. {change.dropped[:1]}", where="data set"
        )
    _tell(path_or_dataset if named else type(data).__name__, result, found, first, format is None, change.dropped)
    if show:
        _show_example(result, found, tokenizer)
    return result


class _Canonical:
    """The change of one batch of rows to the form of their format."""

    def __init__(self, format: str, renamed: dict[str, str], on_error: OnError) -> None:
        self.format, self.renamed = format, renamed
        self.on_error: OnError = on_error
        self.dropped: list[DataError] = []
        self.kinds: dict[str, str] = {}
        self.columns: set[str] = set()  # of the result, once they are settled

    def __call__(self, rows: list[Row], numbers: Iterable[int]) -> list[Row]:
        results = [or_error(self.one, row, number) for row, number in zip(rows, numbers, strict=True)]
        return settle(results, self.on_error, f"rows are no {self.format} rows", self.dropped)

    def one(self, row: Any) -> Row:
        if not isinstance(row, Mapping):
            raise DataError(f"a row is {type(row).__name__}, not a dict")
        result = canonical(_opened(row, self.renamed), self.format)
        self._check_columns(result)
        for key, value in result.items():
            kind = "text" if isinstance(value, str) else "messages" if isinstance(value, list) else "a value"
            if self.kinds.setdefault(key, kind) != kind and key not in _JSON_COLUMNS:
                raise DataError(f"column {key!r} holds {kind} here and {self.kinds[key]} in the first row")
            _check_storable(value)
        return result

    def _check_columns(self, row: Row) -> None:
        if not self.columns:
            return
        if new := sorted(set(row) - self.columns):
            raise DataError(f"column {new[0]!r} is in this row and not in the first", fix="give the first row one too")
        if missing := sorted(self.columns - set(row) - set(_JSON_COLUMNS)):
            raise DataError(f"column {missing[0]!r} is missing here and in the first row it is not")


def _check_storable(value: Any) -> None:
    """Raise `DataError` for a value that a table of text and JSON can't hold."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise DataError(f"a text has half a surrogate pair: {value[:40]!r}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_storable(str(key))
            _check_storable(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_storable(item)
    elif isinstance(value, int):
        if value.bit_length() > 63:
            raise DataError("a number has more than 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"a number is {value}")
    elif value is not None:
        raise DataError(f"a value is {type(value).__name__}, which JSON has not")


def _changed(data: Any, change: _Canonical, streaming: bool) -> Any:
    """The data in canonical form: a stream for a stream or on request, else a `Dataset`."""
    features = _features(change.format, data, change, streaming)
    change.columns = set(features)
    if is_stream(data) or is_dataset(data):
        result = change_rows(data, change, description="Reading", features=features)
        return result.to_iterable_dataset() if streaming and is_dataset(result) else result
    from datasets import Dataset, IterableDataset, concatenate_datasets

    def rows() -> Iterator[Row]:
        for batch, numbers in batches_of(data, 1000, None):
            yield from change(batch, numbers)

    if streaming:
        return IterableDataset.from_generator(rows, features=features)
    pieces = []
    for batch, numbers in batches_of(data, 1000, "Reading"):
        changed = change(batch, numbers)
        pieces.append(
            Dataset.from_dict({key: [row.get(key) for row in changed] for key in features}, features=features)
        )
    result = concatenate_datasets(pieces)
    unused = [name for name in _JSON_COLUMNS if name in features and not any(result[name])]
    return result.remove_columns(unused)


def _features(format: str, data: Any, change: _Canonical, streaming: bool) -> Any:
    """Columns of the canonical form. Messages are stored as JSON, so that no message takes on keys of another.

    Rows of a list may have columns that the first has not; in a stream they must show at once.
    """
    from datasets import Features, Json, List, Value

    first = _first_usable(data, change)
    kinds: dict[str, Any] = {}
    for key, value in first.items():
        if key in _JSON_COLUMNS:
            kinds[key] = Json()
        elif isinstance(value, list):
            kinds[key] = List(Json())
        else:
            kinds[key] = Value("bool") if isinstance(value, bool) else Value("string")
    if format in ("messages", "sharegpt"):
        known = column_names(data) if streaming or is_stream(data) or is_dataset(data) else _JSON_COLUMNS
        kinds |= {name: Json() for name in _JSON_COLUMNS if name in known}
    return Features(kinds)


def _first_usable(data: Any, change: _Canonical) -> Row:
    """The first row in canonical form; where rows may be dropped, the first that can be used."""
    for number, row in enumerate(data):
        result = or_error(change.one, row, number)
        if not isinstance(result, DataError):
            return result
        if change.on_error == "raise":
            raise result
    raise DataError("no row can be used", where="data set")


def _opened(row: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    """The row with its columns renamed, and conversations read that a table holds as JSON text."""
    opened = {names.get(key, key): value for key, value in row.items()}
    for name in CONVERSATION_COLUMNS:
        text = opened.get(name)
        if isinstance(text, str) and text.lstrip().startswith("["):
            with contextlib.suppress(ValueError, RecursionError):  # text that is no JSON stays text
                opened[name] = json.loads(text)
    return opened


def _names(data: Any, renamed: Mapping[str, str]) -> list[str]:
    return [renamed.get(name, name) for name in column_names(data)]


def _tell(source: Any, result: Any, format: str, first: Row, detected: bool, dropped: list[DataError]) -> None:
    count = "a stream of rows" if is_stream(result) else f"{len(result):,} rows"
    column = conversation_column(first)
    said = f"column {column!r}" if column else f"columns {', '.join(map(repr, first))}"
    how = "detected from" if detected else "as asked, from"
    unread = [repr(name) for name in first if name not in columns_read(first, format)]
    not_read = f"; columns not used: {', '.join(unread)}" if unread else ""
    left_out = f"; {len(dropped):,} rows left out" if dropped else ""
    notice(f"fastllm: {source}: {count}, format {format} ({how} {said}){not_read}{left_out}")


def _show_example(result: Any, format: str, tokenizer: Any) -> None:
    row = first_row(result)
    trainable = format in ("text", "alpaca", "sharegpt", "messages", "prompt-completion")
    if tokenizer is not None and trainable:
        from .preview import preview

        preview([row], 1, tokenizer)
        return
    notice("\n".join(["an example:", *(f"  {key}: {_short(value)}" for key, value in row.items() if value)]))


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        lines = [f"    {message.get('role', '?')}: {_short(message.get('content'))}" for message in value]
        return "\n" + "\n".join(lines)
    text = str(value)
    return text if len(text) <= _EXAMPLE else text[:_EXAMPLE] + " ..."

"""ShareGPT conversations: made from columns, brought to `role`/`content`, written as tagged text and read back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .._errors import ArgumentError, DataError, UnsupportedError
from .._notices import notice
from .formats import CONTENT_KEYS, CONVERSATION_COLUMNS, ROLE_KEYS, conversation_column, without_nulls
from .sources import (
    Row,
    change_rows,
    column_names,
    first_row,
    is_dataset,
    is_split_dict,
    is_stream,
    or_error,
    settle,
)

_PEEKED_ROWS = 10
_SYSTEM = "You are a helpful assistant."


class MissingColumnError(DataError, KeyError):
    """A column that a prompt names and the data set does not have."""

    __str__ = Exception.__str__


class EmptyBlockError(ArgumentError, IndexError):
    """An optional block of a prompt that names no column, so nothing decides whether it is shown."""


class UnknownRoleError(DataError, TypeError):
    """A role that is none of the aliases given."""


def standardize_data_formats(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Bring a `conversations` (or `messages`) column to messages with `role` and `content`.

    Roles become `system`, `user` and `assistant`; other keys of a message stay. Which keys hold role and content is
    told by their names, else by the data: the one with fewer different values is the role. With a processor, text
    becomes a list of one text part. Data without such a column is returned as it is. `num_proc` is accepted and not
    needed.

    Errors: `UnknownRoleError` (a `TypeError`) for a role that is no alias, `DataError` for unreadable messages.
    """
    if num_proc is not None:
        notice(f"fastllm: num_proc={num_proc} is not needed: one process converts the rows", once="data:num_proc")
    probe = dataset[next(iter(dataset))] if is_split_dict(dataset) else dataset
    column = next((name for name in CONVERSATION_COLUMNS if name in column_names(probe)), None)
    if column is None:
        return dataset
    keys = _keys_of(probe, column, {*aliases_for_system, *aliases_for_user, *aliases_for_assistant})
    roles = {
        **dict.fromkeys(aliases_for_system, "system"), **dict.fromkeys(aliases_for_user, "user"),
        **dict.fromkeys(aliases_for_assistant, "assistant"), "tool": "tool", "developer": "developer",
    }  # fmt: skip
    as_parts = hasattr(tokenizer, "image_processor") or hasattr(tokenizer, "feature_extractor")

    def standard(row: Row) -> Row:
        return {**row, column: [_standard(message, keys, roles, as_parts) for message in row[column] or []]}

    def change(rows: list[Row], numbers: Iterable[int]) -> list[Row]:
        results = [or_error(standard, row, number) for row, number in zip(rows, numbers, strict=True)]
        return settle(results, "raise", "rows can't be brought to role and content", [])

    features = _standard_features(probe, column, as_parts)
    return change_rows(
        dataset, change, description="Standardizing", batch_size=batch_size, features=features, keep_columns=True
    )


standardize_sharegpt = standardize_data_formats


def _keys_of(dataset: Any, column: str, aliases: set[str]) -> tuple[str, str]:
    """The names of a message's role and content."""
    messages = [without_nulls(message) for row in _peek(dataset) for message in row[column] or []]
    if not messages:
        raise DataError(f"the first {_PEEKED_ROWS} rows have no messages", where=f"column {column!r}")
    if not all(isinstance(message, Mapping) for message in messages):
        raise DataError("a message is no dict with role and content", where=f"column {column!r}")
    shared = set.intersection(*(set(message) for message in messages))
    role = next((key for key in ROLE_KEYS if key in shared), None)
    content = next((key for key in CONTENT_KEYS if any(key in message for message in messages)), None)
    if role and content:
        return role, content
    if len(shared) != 2:
        raise DataError(f"messages have the keys {sorted(shared)}, none of which is a role", where=f"column {column!r}")
    one, other = sorted(shared, key=lambda key: len({str(message[key]) for message in messages}))
    if (
        not {str(message[one]) for message in messages} & aliases
        and {str(message[other]) for message in messages} & aliases
    ):
        return other, one
    return one, other


def _peek(dataset: Any) -> list[Row]:
    return [row for row, _ in zip(dataset, range(_PEEKED_ROWS), strict=False)]


def _standard(message: Any, keys: tuple[str, str], roles: Mapping[str, str], as_parts: bool) -> Row:
    if not isinstance(message, Mapping) or not isinstance(message.get(keys[0]), str):
        raise DataError(f"a message has no {keys[0]!r}: {str(message)[:80]}")
    role, content = message[keys[0]], message.get(keys[1])
    if role not in roles:
        raise UnknownRoleError(
            f"the role {role!r} is not known",
            fix=f"standardize_data_formats(dataset, aliases_for_user=[..., {role!r}]) or _system or _assistant",
        )
    if as_parts and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    rest = {key: value for key, value in message.items() if key not in keys and value is not None}
    return {"role": roles[role], "content": without_nulls(content), **without_nulls(rest)}


def _standard_features(dataset: Any, column: str, as_parts: bool) -> Any:
    """Features of the result: plain ones where every message is two strings, else JSON, which keeps rows apart."""
    if not is_dataset(dataset):
        return None
    from datasets import Features, Json, List, Value

    message = getattr(dataset.features[column], "feature", None)
    two_strings = isinstance(message, dict) and len(message) == 2 and {f.dtype for f in message.values()} == {"string"}
    plain = {"role": Value("string"), "content": Value("string")}
    return Features({**dataset.features, column: List(plain if two_strings and not as_parts else Json())})


class _Block(NamedTuple):
    """A stretch of a merged prompt: text with `{columns}`; an optional one goes when its first column is empty."""

    text: str
    columns: tuple[str, ...]
    optional: bool


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
    merge_rows: bool = False,
) -> Any:
    """Columns to `conversations` of one human and one gpt message.

    `merged_prompt` makes the human message: `"{instruction}[[\\nYour input is:\\n{input}]]"`; a `[[...]]` block is left
    out where its first column is empty. Without it the message is the column `merged_column_name`.

    `conversation_extension=n` makes conversations of n turns: each row is followed by a row from each of n - 1 shuffled
    copies of the data (seeds `random_state` + 1, + 2, ...), so that the number of rows stays and each example is seen
    about n times. With `merge_rows=True` the shuffled rows are joined n at a time instead, each seen once.

        to_sharegpt(dataset, "{instruction}[[\\nYour input is:\\n{input}]]", conversation_extension=3)

    Errors: `MissingColumnError` (a `KeyError`), `EmptyBlockError` (an `IndexError`) for a block without a column,
    `ArgumentError` (a `TypeError`) for data that is ShareGPT already.
    """
    first = first_row(dataset)
    if conversation_column(first):
        raise ArgumentError("the data set already holds conversations", where="to_sharegpt", fix="leave this call out")
    blocks = _blocks(merged_prompt or f"{{{merged_column_name}}}")
    needed = dict.fromkeys([name for block in blocks for name in block.columns] + [output_column_name])
    columns = column_names(dataset)
    for name in needed:
        if name not in columns:
            raise MissingColumnError(f"there is no column {name!r}", where="to_sharegpt", fix=f"columns: {columns}")
    if conversation_extension < 1:
        raise ArgumentError("a conversation has at least one turn", where="conversation_extension")
    if conversation_extension > 1 and is_stream(dataset):
        raise UnsupportedError("a stream can't be shuffled into longer conversations", where="conversation_extension")

    def change(rows: list[Row], numbers: Iterable[int]) -> list[Row]:
        return [
            {**({} if remove_unused_columns else row), "conversations": _turn(row, blocks, output_column_name)}
            for row in rows
        ]

    turns = change_rows(dataset, change, description="Merging columns", keep_columns=not remove_unused_columns)
    if conversation_extension == 1:
        return turns
    return _extended(turns, conversation_extension, random_state, merge_rows)


def _blocks(prompt: str) -> list[_Block]:
    blocks = []
    for piece in re.split(r"(\[\[.*?\]\])", prompt, flags=re.DOTALL):
        optional = piece.startswith("[[") and piece.endswith("]]") and len(piece) > 3
        text = piece[2:-2] if optional else piece
        columns = tuple(re.findall(r"\{(.*?)\}", text))
        if optional and not columns:
            raise EmptyBlockError(f"the optional block {piece!r} names no column", where="merged_prompt")
        if text:
            blocks.append(_Block(text, columns, optional))
    return blocks


def _turn(row: Row, blocks: Sequence[_Block], output_column: str) -> list[dict[str, str]]:
    shown = [block for block in blocks if not block.optional or row[block.columns[0]] not in ("", None)]
    prompt = "".join(_filled(block, row) for block in shown)
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": _written(row[output_column])}]


def _filled(block: _Block, row: Row) -> str:
    return re.sub(r"\{(.*?)\}", lambda match: _written(row[match[1]]), block.text)


def _written(value: Any) -> str:
    return "" if value is None else str(value)


def _extended(dataset: Any, turns: int, random_state: int, merge_rows: bool) -> Any:
    """The rows joined into conversations of several turns."""
    import numpy

    count = len(dataset)
    if merge_rows:
        order = numpy.random.default_rng(random_state).permutation(count)
        groups = [order[start : start + turns] for start in range(0, count, turns)]
    else:
        seeds = range(random_state + 1, random_state + turns)
        copies = [numpy.arange(count), *(numpy.random.default_rng(seed).permutation(count) for seed in seeds)]
        groups = list(numpy.stack(copies, axis=1))
    talks = [row["conversations"] for row in dataset]
    joined = [[message for number in group for message in talks[number]] for group in groups]
    if not is_dataset(dataset):
        return [{**dataset[int(group[0])], "conversations": talk} for group, talk in zip(groups, joined, strict=True)]
    from datasets import Dataset

    kept = dataset.remove_columns("conversations").select([int(group[0]) for group in groups])
    talks_only = Dataset.from_dict({"conversations": joined}, features=dataset.select_columns("conversations").features)
    return talks_only if not kept.column_names else kept.add_column("conversations", talks_only.data["conversations"])


def sharegpt_to_chatml(conversation: Any, system_message: str | None = _SYSTEM) -> Any:
    """A ShareGPT conversation as text: `<|role|>text<|end|>`, one message a line.

    Takes a row with `conversations`, its list of messages, or a list of rows (and gives a list of texts). Messages may
    say `from`/`value` or `role`/`content`; human, gpt and model become user and assistant. `system_message` opens a
    conversation that has none; None adds nothing.
    """
    if isinstance(conversation, (list, tuple)) and conversation and conversation_column(conversation[0]):
        return [sharegpt_to_chatml(row, system_message) for row in conversation]
    from .formats import messages_of

    row = conversation if isinstance(conversation, Mapping) else {"conversations": conversation}
    messages = messages_of(row)
    if system_message is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_message})
    return "\n".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)


def chatml_to_sharegpt(text: Any, include_system: bool = False) -> Any:
    """The way back: text of `<|role|>text<|end|>` as `{"conversations": [{"from": ..., "value": ...}]}`.

    User and assistant become human and gpt; the system message is left out unless `include_system`. A list of texts
    gives a list of rows. Errors: `DataError` where the text holds no message, or text outside of messages.
    """
    if isinstance(text, (list, tuple)):
        return [chatml_to_sharegpt(item, include_system) for item in text]
    if not isinstance(text, str):
        raise DataError(f"expected text, not {type(text).__name__}", where="chatml_to_sharegpt")
    names = {"user": "human", "assistant": "gpt", "model": "gpt"}
    pattern = re.compile(r"<\|(\w+)\|>(.*?)<\|end\|>", re.DOTALL)
    if not pattern.search(text) or pattern.sub("", text).strip():
        raise DataError(f"this is not a series of <|role|>text<|end|>: {text[:80]!r}", where="chatml_to_sharegpt")
    messages = [{"from": names.get(role, role), "value": value} for role, value in pattern.findall(text)]
    return {"conversations": [message for message in messages if include_system or message["from"] != "system"]}

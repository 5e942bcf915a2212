"""The formats that training data comes in, how they are told apart, and the one form each is brought into.

| format | columns | becomes |
|---|---|---|
| text | `text` | `text` |
| alpaca | `instruction`, optional `input` and `system`, `output` | `messages` |
| sharegpt | `conversations` of `from`/`value` | `messages` |
| messages | `messages` of `role`/`content`, optional `tools` | `messages` |
| prompt-completion | `prompt`, `completion` | the same |
| preference | `chosen`, `rejected`, optional `prompt` | the same |
| kto | `prompt`, `completion`, `label` | the same |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._errors import DataError
from .rendering import Message

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "message")
PROMPT_COLUMNS = ("instruction", "prompt", "question", "query", "input")
ANSWER_COLUMNS = ("output", "response", "completion", "answer", "target")
CONTEXT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
_ROW_EXTRAS = ("tools", "chat_template_kwargs")  # what a row may tell the chat template

ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def detect_format(columns: Iterable[str], row: Mapping[str, Any]) -> str:
    """The name of the format of a data set with `columns`, of which `row` is one.

    Errors: `DataError` that lists the columns and what each format would need.
    """
    names = set(columns)
    if {"chosen", "rejected"} <= names:
        return "preference"
    if {"prompt", "completion", "label"} <= names:
        return "kto"
    if {"prompt", "completion"} <= names:
        return "prompt-completion"
    column = conversation_column(row)
    if column:
        first = next((message for message in row[column] if isinstance(message, Mapping)), {})
        return "messages" if "role" in first else "sharegpt"
    if _first_of(PROMPT_COLUMNS, names) and _first_of(ANSWER_COLUMNS, names):
        return "alpaca"
    if "text" in names:
        return "text"
    raise DataError(
        f"no known format has the columns {sorted(names)}",
        where="data set",
        fix="name the columns messages | conversations | instruction + output | prompt + completion | "
        "chosen + rejected | text, for instance dataset.rename_column('body', 'text')",
    )


def columns_read(row: Mapping[str, Any], format: str) -> set[str]:
    """The columns of `row` that its canonical form is made of."""
    if format == "alpaca":
        return {name for name in _alpaca_columns(row) if name}
    if format == "preference":
        kinds = (_PREFERENCE_PROMPTS, ("chosen",), ("rejected",), SYSTEM_COLUMNS)
        return {name for kind in kinds if (name := _first_of(kind, row))}
    if format in ("messages", "sharegpt"):
        found = (conversation_column(row), _first_of(SYSTEM_COLUMNS, row), *_ROW_EXTRAS)
        return {name for name in found if name}
    return {"text": {"text"}, "kto": {"prompt", "completion", "label"}}.get(format, {"prompt", "completion"})


def conversation_column(row: Mapping[str, Any]) -> str | None:
    """The column of `row` that holds a list of messages."""
    for column in CONVERSATION_COLUMNS:
        value = row.get(column)
        if isinstance(value, (list, tuple)) and (not value or isinstance(value[0], Mapping)):
            return column
    return None


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The row's conversation with the keys `role` and `content`, whatever it calls them; other keys are kept.

    Errors: `DataError` that names the message and what is wrong with it.
    """
    column = conversation_column(row)
    if column is None:
        raise DataError(f"the row has no conversation, only {sorted(map(str, row))}", fix="load_chat_data(dataset)")
    if not row[column]:
        raise DataError("the conversation has no messages")
    return [_message(message, number) for number, message in enumerate(row[column])]


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"message {number} is {type(message).__name__}, not a dict with role and content")
    if len(message) == 2 and message.get("role") and {type(message["role"]), type(message.get("content"))} == {str}:
        return dict(message)  # nearly every message of nearly every data set
    role_key = _first_of(ROLE_KEYS, message)
    role = message[role_key] if role_key else None
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"message {number} has no role, only {sorted(map(str, message))}")
    if role_key != "role":
        role = ROLES.get(role.strip().lower(), role)
    content_key = _first_of(CONTENT_KEYS, message)
    content = message[content_key] if content_key else None
    _check_content(content, message, number)
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    return {"role": role, "content": without_nulls(content), **without_nulls(rest)}


def _check_content(content: Any, message: Mapping[str, Any], number: int) -> None:
    if content is None:
        if not any(message.get(key) for key in ("tool_calls", "reasoning_content", "thinking")):
            raise DataError(f"message {number} ({message.get('role') or message.get('from')}) has no content")
    elif isinstance(content, (list, tuple)):
        for part in content:
            if not isinstance(part, (str, Mapping)):
                raise DataError(f"message {number} has a content part of type {type(part).__name__}")
    elif not isinstance(content, (str, Mapping)):
        raise DataError(f"message {number} has content of type {type(content).__name__}, not text")


def without_nulls(value: Any) -> Any:
    """`value` without the empty keys that Arrow tables give to rows whose neighbours have more keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def canonical(row: Mapping[str, Any], format: str) -> dict[str, Any]:
    """The row in the form of the table above. Errors: `DataError` with what is missing or of the wrong type."""
    return _CANONICAL[format](row)


def _alpaca_columns(row: Mapping[str, Any]) -> tuple[str | None, str | None, str | None, str | None]:
    """The columns of question, context, answer and system message."""
    question = _first_of(PROMPT_COLUMNS, row)
    context = _first_of([name for name in CONTEXT_COLUMNS if name != question], row)
    return question, context, _first_of(ANSWER_COLUMNS, row), _first_of(SYSTEM_COLUMNS, row)


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    question_key, context_key, answer_key, _ = _alpaca_columns(row)
    question, answer = _text(row, question_key or ""), _text(row, answer_key or "")
    context = row[context_key] if context_key else None
    if context is not None and not isinstance(context, str):
        raise DataError(f"column {context_key!r} holds {type(context).__name__}, not text")
    question = f"{question}\n\n{context}" if context and context.strip() else question
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*_system(row), *turns]}


def _system(row: Mapping[str, Any]) -> list[Message]:
    """The system message that a column of the row holds, if any."""
    text = row.get(_first_of(SYSTEM_COLUMNS, row) or "")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = messages_of(row)
    system = _system(row) if messages[0]["role"] != "system" else []
    return {"messages": [*system, *messages], **{key: row[key] for key in _ROW_EXTRAS if row.get(key)}}


def _prompt_and_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _side(row, key) for key in ("prompt", "completion")}


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise DataError(f"column {key!r} is empty")
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same, which teaches nothing")
    if type(chosen) is not type(rejected):
        raise DataError("chosen and rejected must both be text or both be messages")
    key = _first_of(_PREFERENCE_PROMPTS, row)
    if key is None or row[key] is None:
        return {"chosen": chosen, "rejected": rejected}
    prompt = _side(row, key)
    if isinstance(prompt, str) and (isinstance(chosen, list) or _first_of(SYSTEM_COLUMNS, row)):
        return _pair_of_messages(_system(row), prompt, chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _pair_of_messages(system: list[Message], prompt: str, chosen: Any, rejected: Any) -> dict[str, Any]:
    """The pair as messages, where only its prompt is text, or a system message has to join it."""
    question: list[Message] = [{"role": "user", "content": prompt}]
    if isinstance(chosen, str):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    elif chosen[0]["role"] != "assistant":
        question, chosen, other, rejected = chosen[:-1], chosen[-1:], rejected[:-1], rejected[-1:]
        if question != other or question[-1:] != [{"role": "user", "content": prompt}]:
            raise DataError("chosen and rejected begin with messages that are not the prompt")
    system = system if question[0]["role"] != "system" else []
    return {"prompt": [*system, *question], "chosen": chosen, "rejected": rejected}


def _kto(row: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("label"), (bool, int)) or row["label"] not in (0, 1):
        raise DataError(f"label must be True (wanted) or False (unwanted), not {row.get('label')!r}")
    return {**_prompt_and_completion(row), "label": bool(row["label"])}


def _side(row: Mapping[str, Any], key: str) -> Any:
    """One side of a pair: text, or messages."""
    if isinstance(row.get(key), (list, tuple)):
        return messages_of({"messages": row[key]})
    return _text(row, key)


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"column {key!r} holds {type(value).__name__}, not text")
    return value


_PREFERENCE_PROMPTS = ("prompt", "question", "instruction")
_CANONICAL = {
    "text": lambda row: {"text": _text(row, "text")},
    "alpaca": _alpaca,
    "sharegpt": _conversation,
    "messages": _conversation,
    "prompt-completion": _prompt_and_completion,
    "preference": _preference,
    "kto": _kto,
}
FORMATS = tuple(_CANONICAL)


def _first_of(keys: Sequence[str], among: Any) -> str | None:
    return next((key for key in keys if key in among), None)

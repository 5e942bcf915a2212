"""Ollama Modelfiles, derived from the chat template that was trained.

The template is rendered with known words for its messages; what it writes around them becomes the Go template of
`TEMPLATE`. Ollama adds the BOS token itself, so the leading one is dropped. Reference: docs.ollama.com/modelfile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .._errors import DataError
from .rendering import tokenizer_of
from .sandbox import TemplateError, compile_template
from .templates import TOKENIZERS_EOS, is_known

FILE_LOCATION = "{__FILE_LOCATION__}"  # stands for the GGUF file until it has a name
EOS_TOKEN = "{__EOS_TOKEN__}"  # noqa: S105 - stands for the tokenizer's EOS in the table of templates
BOS_TOKEN = "<s>"  # noqa: S105 - where no tokenizer says what it is called
_BOS = "\U00100000bos\U00100001"  # no text that a template writes by itself


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the messages of a conversation: before and after each role, first turns apart."""

    first: tuple[str, str] | None  # before and after a system message that is part of the first user turn
    system: tuple[str, str] | None  # before and after a system message with a turn of its own
    opening: str  # before the first user message where there is no system message
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str


def modelfile(
    jinja: str,
    stop_word: str = TOKENIZERS_EOS,
    *,
    eos_token: str = EOS_TOKEN,
    bos_token: str = BOS_TOKEN,
    system_message: str | None = None,
    extra_stops: tuple[str, ...] = (),
    location: str = FILE_LOCATION,
    projector: str | None = None,
) -> str:
    """The Modelfile for a model trained with the chat template `jinja`.

    `location` is the GGUF file, `projector` the mmproj file of a vision-language model beside it.
    Stop parameters are the stop word, the end-of-turn text of the template and what opens a user turn. Errors:
    `TemplateError` for a template that does not show a plain conversation.
    """
    frame = _frame(jinja, eos_token)
    stop_word = eos_token if stop_word == TOKENIZERS_EOS else stop_word
    ending = frame.assistant[1].strip()
    stops = dict.fromkeys(text for text in (stop_word, ending, _header(frame), *extra_stops) if text.strip())
    files = [location] if projector is None else [location, projector]
    lines = [
        *(f"FROM {file}" for file in files),
        "",
        f'TEMPLATE """{_go_template(frame).replace(_BOS, bos_token)}"""',
        "",
    ]
    lines += [f"PARAMETER stop {_go_string(stop)}" for stop in stops]
    lines += ["PARAMETER temperature 1.5", "PARAMETER min_p 0.1"]
    if system_message:
        lines.append(f'SYSTEM """{system_message}"""')
    return "\n".join(lines) + "\n"


def modelfile_of(tokenizer: Any, location: str = FILE_LOCATION, projector: str | None = None) -> str:
    """The Modelfile for a model trained with the chat template of `tokenizer`, or a processor; see `modelfile`."""
    core = tokenizer_of(tokenizer)
    template = getattr(tokenizer, "chat_template", None) or getattr(core, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise DataError(
            "the tokenizer has no chat template", where="Modelfile", fix="get_chat_template(tokenizer, ...)"
        )
    return modelfile(
        template, eos_token=core.eos_token or "", bos_token=core.bos_token or "",
        system_message=getattr(core, "_system_message", None), location=location, projector=projector,
    )  # fmt: skip


def _frame(jinja: str, eos_token: str) -> _Frame:
    """Learn the frame by rendering conversations of known words."""
    asked = _pieces(jinja, eos_token, "UAVB")
    bare = asked[0].removeprefix(_BOS)
    prompt, tail = _prompt(jinja, eos_token, "U")
    answer_end = asked[4]
    between = asked[2]
    user_before = between[len(answer_end) :] if between.startswith(answer_end) else between
    user_after = tail if asked[1].startswith(tail) else asked[1]
    assistant = (asked[1][len(user_after) :], answer_end if between.startswith(answer_end) else "")
    first = system = None
    try:
        told = _pieces(jinja, eos_token, "SUAVB")
    except TemplateError:
        told = None
    if told:
        before = told[0].removeprefix(_BOS)
        if user_before and told[1].endswith(user_before) and bare.endswith(user_before):
            system = (before, told[1][: -len(user_before)])
        else:
            first = (before, told[1])
    return _Frame(first, system, bare, (user_before, user_after), assistant, prompt)


_WORDS = {"S": ("system", "Systemword"), "U": ("user", "Userword"), "A": ("assistant", "Answerword"),
          "V": ("user", "Userwordtwo"), "B": ("assistant", "Answerwordtwo")}  # fmt: skip


def _pieces(jinja: str, eos_token: str, letters: str) -> list[str]:
    """What stands before, between and after the words of the conversation `letters`."""
    text = _render(jinja, eos_token, letters)
    pieces = []
    for letter in letters:
        before, found, text = text.partition(_WORDS[letter][1])
        if not found:
            raise TemplateError(f"the chat template leaves out a {_WORDS[letter][0]} message")
        pieces.append(before)
    return [*pieces, text]


def _prompt(jinja: str, eos_token: str, letters: str) -> tuple[str, str]:
    """The generation prompt, and what ends a user turn."""
    stopped = _render(jinja, eos_token, letters)
    prompted = _render(jinja, eos_token, letters, add_generation_prompt=True)
    tail = stopped[stopped.rindex(_WORDS[letters[-1]][1]) + len(_WORDS[letters[-1]][1]) :]
    return prompted[len(stopped) :] if prompted.startswith(stopped) else "", tail


def _render(jinja: str, eos_token: str, letters: str, add_generation_prompt: bool = False) -> str:
    messages = [{"role": role, "content": word} for role, word in (_WORDS[letter] for letter in letters)]
    variables = {
        "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None,
        "bos_token": _BOS, "eos_token": eos_token, "unk_token": "", "pad_token": "",
    }  # fmt: skip
    return compile_template(jinja, is_known(jinja)).render(variables)


def _go_template(frame: _Frame) -> str:
    """The frame in Go's template language, over `.Messages`."""
    write = _go_text
    user_before, user_after = frame.user
    opening = f"{{{{ if eq $i 0 }}}}{write(frame.opening)}{{{{ else }}}}{write(user_before)}{{{{ end }}}}"
    if frame.first:
        before, after = frame.first
        # a system message that is part of the first user turn; in .Messages it comes first, and is written there
        system = f'{{{{ if eq .Role "system" }}}}{write(before)}{{{{ .Content }}}}{write(after)}'
        opening = (
            f"{{{{ if eq $i 0 }}}}{write(frame.opening)}"
            f"{{{{ else if not (and $.System (eq $i 1)) }}}}{write(user_before)}{{{{ end }}}}"
        )
    elif frame.system:
        before, after = frame.system
        system = f'{{{{ if eq .Role "system" }}}}{write(before)}{{{{ .Content }}}}{write(after)}'
    else:
        system = '{{ if eq .Role "system" }}'
    if frame.opening == user_before and not frame.first:
        opening = write(user_before)
    last = "{{ if $last }}" + write(frame.prompt or frame.assistant[0].rstrip()) + "{{ end }}"
    return (
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{system}{{{{ else if eq .Role "user" }}}}{opening}{{{{ .Content }}}}{write(user_after)}{last}'
        f'{{{{ else if eq .Role "assistant" }}}}{write(frame.assistant[0])}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{write(frame.assistant[1])}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )


def _go_text(text: str) -> str:
    """Literal text of a Go template; today's date is written so that it stays today's."""
    from datetime import datetime

    parts = re.split(r"(\{\{)", text)
    text = "".join('{{ "{{" }}' if part == "{{" else part for part in parts)
    return text.replace(datetime.now().strftime("%Y-%m-%d"), "{{ currentDate }}")


def _go_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _header(frame: _Frame) -> str:
    """What opens a user turn, without what may end the turn before it."""
    text = frame.user[0].replace(_BOS, "").strip().split("\n")[0]
    return text if not frame.user[1].strip() else text.removeprefix(frame.user[1].strip())

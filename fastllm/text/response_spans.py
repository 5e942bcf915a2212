"""Where the answers are: the part of a rendered conversation that the model has to produce itself.

A span runs from the end of the generation prompt to the end of the turn, end-of-turn token included. It is found from
the template, never by searching the text for strings that might also be in somebody's message: the conversation is
rendered a second time with marks around the contents of each message, one pair of private characters a message, and
where that text without its marks is the text itself, the marks' positions are the messages' positions. What the
template writes between them is then compared with what it writes at the end of a conversation that stops there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from .._errors import DataError
from .rendering import ChatRenderer, Message, as_schemas, map_text
from .sandbox import TemplateError

_FIRST_MARK = 0x100000  # a private-use plane without characters of its own
_MOST_MESSAGES = 32_000
_MOST_FRAMES = 1_000
_MARKS = re.compile("[\U00100000-\U0010fffd]")
_TAG = re.compile(r"\s*<[^<>\s]+>")  # a control token such as <|im_end|> or </s>
_MARKED_KEYS = ("content", "reasoning_content", "thinking")

MarkText = Callable[[str, int], str]


class Span(NamedTuple):
    """Characters `start` to `end` of the text, which message number `message` has to produce."""

    start: int
    end: int
    message: int


@dataclass
class Rendered:
    """A conversation as text, with the spans of its answers and the numbers of messages that left no trace in it."""

    text: str
    spans: list[Span] = field(default_factory=list)
    vanished: list[int] = field(default_factory=list)


class _Run(NamedTuple):
    """Consecutive marks of one message: positions of the first and the last in the text without marks, and how many
    marks of the message there are up to the last."""

    message: int
    first: int
    last: int
    marks: int


def _mark_edges(text: str, message: int) -> str:
    """Marks inside the white space at both ends, which templates may trim."""
    core = text.strip()
    if not core:
        return text
    head = text[: len(text) - len(text.lstrip())]
    tail = text[len(head) + len(core) :]
    mark = _FIRST_MARK + 2 * message
    return f"{head}{chr(mark)}{core}{chr(mark + 1)}{tail}"


def _mark_middle(text: str, message: int) -> str:
    """A mark where no test for how the text begins or ends can see it."""
    core = text.strip()
    if not core:
        return text
    middle = text.index(core) + len(core) // 2
    return text[:middle] + chr(_FIRST_MARK + 2 * message + 1) + text[middle:]


class ResponseFinder:
    """Finds the answers in conversations rendered by one template.

    Learned from a rendered example: `opening`, what the template writes to open an answer (`<|im_start|>assistant\\n`);
    `ending` and `last_ending`, what ends one in mid-conversation and at its end (`<|im_end|>`); `between`, all that
    stands between a question and its answer; `question_opening`, what opens the next question.
    """

    def __init__(self, renderer: ChatRenderer) -> None:
        self.renderer = renderer
        self._frames: dict[tuple[str, ...], _Frame] = {}
        self._learn()

    def find(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """Render `messages` and find the spans of its assistant messages.

        Errors: `TemplateError` where the template refuses the conversation, `DataError` where its answers can't be told
        from the rest.
        """
        prepared, schemas = self.renderer.prepare(messages), as_schemas(tools)
        if len(prepared) > _MOST_MESSAGES:
            raise DataError(f"a conversation of {len(prepared):,} messages; up to {_MOST_MESSAGES:,} are supported")
        text = self.renderer.render_prepared(prepared, schemas)
        roles = None if schemas else _plain_roles(prepared)
        if roles and (frame := self._frames.get(roles)) and (known := frame.fitted(text, prepared)):
            return known
        if not text.isascii() and _MARKS.search(text):
            raise DataError("the text has characters of Unicode's last private-use plane, which mark answers here")
        search = _Search(self, prepared, schemas, text)
        found = search.result()
        if roles and len(self._frames) < _MOST_FRAMES and (frame := _Frame.of(search, found)):
            self._frames[roles] = frame
        return found

    def _learn(self) -> None:
        question, answer = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
        asked, bare = [question], [question, answer, question, answer]
        asked, bare = self.renderer.prepare(asked), self.renderer.prepare(bare)
        text, runs = _parse(self.renderer.render_prepared(_marked(bare, _mark_edges, _mark_edges)))
        if [run.message for run in runs] != [0, 1, 2, 3]:
            raise TemplateError("the chat template does not show the messages of a conversation in their order")
        prompt = self.renderer.render_prepared(asked, add_generation_prompt=True)
        stopped = self.renderer.render_prepared(asked)
        generation_prompt = prompt[len(stopped) :] if prompt.startswith(stopped) else ""
        self.between = header = text[runs[0].last : runs[1].first]
        if "one" not in stopped:
            raise TemplateError("the chat template does not show a question without its answer")
        question_end = stopped[stopped.rindex("one") + 3 :]
        header = header.removeprefix(question_end)
        self.opening = _common_start(generation_prompt, header) if generation_prompt else header.rstrip()
        gap, tail = text[runs[1].last : runs[2].first], text[runs[3].last :]
        self.ending = _shared_ending(gap, tail)
        self.last_ending = self.ending if tail.startswith(self.ending) and self.ending else _shared_ending(tail, gap)
        self.question_opening = gap.removeprefix(self.ending)


def _plain_roles(messages: Sequence[Message]) -> tuple[str, ...] | None:
    """The roles of messages that are nothing but a role and some text; None where one is more."""
    if all(len(message) == 2 and isinstance(message.get("content"), str) for message in messages):
        return tuple(message["role"] for message in messages)
    return None


@dataclass(frozen=True)
class _Frame:
    """What a template wrote around the contents of a conversation: `pieces` before, between and after them, and the
    spans of its answers relative to the contents' starts and ends.

    A conversation of the same roles whose text is these pieces around its own contents needs no marks. One that the
    template treats otherwise does not fit, and is searched.
    """

    pieces: tuple[str, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, search: _Search, found: Rendered) -> _Frame | None:
        """The frame of a searched conversation; None unless each message stands in it once, as it is, in order."""
        runs, text = search.runs, search.text
        contents = [message["content"] for message in search.messages]
        if [run.message for run in runs] != list(range(len(contents))) or search.mark_others is not _mark_edges:
            return None
        if any(text[run.first : run.last] != content for run, content in zip(runs, contents, strict=True)):
            return None
        starts, ends = [run.first for run in runs], [run.last for run in runs]
        pieces = [text[start:end] for start, end in zip([0, *ends], [*starts, len(text)], strict=True)]
        spans = [
            Span(span.start - starts[span.message], span.end - ends[span.message], span.message) for span in found.spans
        ]
        return cls(tuple(pieces), tuple(spans))

    def fitted(self, text: str, messages: Sequence[Message]) -> Rendered | None:
        """The answers of another conversation of the same roles, if `text` is this frame around its contents."""
        contents = [message["content"] for message in messages]
        if not all(contents):
            return None
        for written in (contents, [content.strip() for content in contents]):
            parts = [part for pair in zip(self.pieces, written, strict=False) for part in pair]
            if "".join(parts) + self.pieces[-1] == text:
                break
        else:
            return None
        ends = list(accumulate(map(len, parts)))[1::2]
        spans = [Span(ends[i] - len(written[i]) + start, ends[i] + end, i) for start, end, i in self.spans]
        return Rendered(text, spans)


class _Search:
    """The search for the answers of one conversation."""

    def __init__(self, finder: ResponseFinder, messages: list[Message], tools: list[dict] | None, text: str) -> None:
        self.finder, self.messages, self.tools, self.text = finder, messages, tools, text
        for self.mark_answers, self.mark_others in (
            (_mark_edges, _mark_edges),
            (_mark_edges, _mark_middle),
            (_mark_middle, _mark_middle),
        ):
            unmarked, self.runs = _parse(self._render_marked(messages))
            if unmarked == text:
                return
        raise DataError(
            "this template changes what it writes with the letters of a message, so its answers can't be located",
            fix="train_on_responses_only(trainer, instruction_part=..., response_part=...)",
        )

    def result(self) -> Rendered:
        spans = []
        for number, run in enumerate(self.runs):
            if self.messages[run.message]["role"] == "assistant":
                before = self.runs[number - 1] if number else None
                after = self.runs[number + 1] if number + 1 < len(self.runs) else None
                spans.append(Span(self._start(run, before), self._end(run, after), run.message))
        seen = {run.message for run in self.runs}
        missing = [number for number in range(len(self.messages)) if number not in seen]
        calls = [number for number in missing if self.messages[number].get("tool_calls")]
        spans += [span for number in calls if (span := self._span_without_marks(number))]
        vanished = [number for number in missing if number not in calls and self._has_text(number)]
        return Rendered(self.text, sorted(spans), vanished)

    def _has_text(self, number: int) -> bool:
        content = self.messages[number].get("content")
        return bool(content.strip() if isinstance(content, str) else content)

    def _start(self, run: _Run, before: _Run | None) -> int:
        """Where the model takes over: after the generation prompt."""
        floor = before.last if before else 0
        opening = self.finder.opening
        found = self.text.find(opening, floor, run.first + 1) if opening else -1
        if found >= 0:
            return min(found + len(opening), run.first)
        written = self._written_after(run.message, add_generation_prompt=True)
        if written is not None and self.text.startswith(written, floor) and floor + len(written) <= run.first:
            return floor + len(written)
        return run.first

    def _end(self, run: _Run, after: _Run | None) -> int:
        """Where the turn ends, end-of-turn token included."""
        finder = self.finder
        if self.mark_answers is _mark_edges:
            text = self.messages[run.message].get("content")
            space = text[len(text.rstrip()) :] if isinstance(text, str) else ""
            for ending in (finder.ending, finder.last_ending):
                for space_kept in (space, ""):
                    if ending and self.text.startswith(space_kept + ending, run.last):
                        return run.last + len(space_kept + ending)
        written = self._written_after(run.message + 1, run)
        if written is None:
            return run.last
        rest = self.text[run.last : after.first if after and self.mark_answers is _mark_edges else None]
        return run.last + len(_shared_ending(rest, written))

    def _span_without_marks(self, number: int) -> Span | None:
        """The span of a message that calls tools and has no text of its own to mark."""
        floor = max((run.last for run in self.runs if run.message < number), default=0)
        prompt = self._written_after(number, add_generation_prompt=True)
        turn = self._written_after(number + 1)
        if prompt is None or turn is None or not self.text.startswith(prompt, floor):
            return None
        end = floor + len(_shared_ending(self.text[floor:], turn))
        return Span(floor + len(prompt), end, number) if end > floor + len(prompt) else None

    def _written_after(self, count: int, run: _Run | None = None, add_generation_prompt: bool = False) -> str | None:
        """What the template writes after `run`, or after its last mark, when the conversation stops after `count`
        messages. None where it refuses to stop there."""
        if not count:
            return None
        try:
            marked = self._render_marked(self.messages[:count], add_generation_prompt)
        except TemplateError:  # such as: a system message alone
            return None
        marks = list(_MARKS.finditer(marked))
        if run is not None:
            marks = [match for match in marks if (ord(match[0]) - _FIRST_MARK) // 2 == run.message][: run.marks]
        return _MARKS.split(marked[marks[-1].end() :])[0] if marks else marked

    def _render_marked(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        marked = _marked(messages, self.mark_answers, self.mark_others)
        return self.finder.renderer.render_prepared(marked, self.tools, add_generation_prompt)


def _marked(messages: Sequence[Message], mark_answers: MarkText, mark_others: MarkText) -> list[Message]:
    """The messages with marks in everything that a template prints of them; a tool's name is also looked up, so not."""
    result = []
    for number, message in enumerate(messages):
        mark = mark_answers if message.get("role") == "assistant" else mark_others
        copy = dict(message)
        for key in _MARKED_KEYS:
            if key in copy:
                copy[key] = _marked_content(copy[key], number, mark)
        if isinstance(copy.get("tool_calls"), list):
            copy["tool_calls"] = [_marked_call(call, number, mark) for call in copy["tool_calls"]]
        result.append(copy)
    return result


def _marked_content(content: Any, number: int, mark: MarkText) -> Any:
    if isinstance(content, str):
        return mark(content, number)
    if isinstance(content, list):
        return [_marked_content(part, number, mark) for part in content]
    if isinstance(content, dict) and isinstance(content.get("text"), str):
        return {**content, "text": mark(content["text"], number)}
    return content


def _marked_call(call: Any, number: int, mark: MarkText) -> Any:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": _marked_call(function, number, mark)}
    if "arguments" in call:
        return {**call, "arguments": map_text(call["arguments"], lambda text: mark(text, number))}
    return call


def _parse(marked: str) -> tuple[str, list[_Run]]:
    """The text without its marks, and the runs of marks in their order."""
    pieces: list[str] = []
    runs: list[_Run] = []
    marks: dict[int, int] = {}
    position = start = 0
    for match in _MARKS.finditer(marked):
        pieces.append(marked[start : match.start()])
        position += match.start() - start
        start = match.end()
        message = (ord(match[0]) - _FIRST_MARK) // 2
        marks[message] = marks.get(message, 0) + 1
        first = runs.pop().first if runs and runs[-1].message == message else position
        runs.append(_Run(message, first, position, marks[message]))
    pieces.append(marked[start:])
    return "".join(pieces), runs


def _common_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _shared_ending(rest: str, stopped: str) -> str:
    """The start of `rest` that ends the turn, given what the template writes where the conversation stops instead.

    Where the two part inside a control token (`<|end|>` here, `<|return|>` there), the token of `rest` ends the turn.
    """
    shared = _common_start(rest, stopped)
    opened = shared.rfind("<")
    if opened > shared.rfind(">") and len(shared) < len(stopped):
        tag = _TAG.match(rest, opened)
        return rest[: tag.end()] if tag else shared[:opened].rstrip()
    return shared.rstrip()

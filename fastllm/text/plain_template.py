"""Templates written as text with `{INPUT}` and `{OUTPUT}`, for people who would rather not write Jinja."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .._errors import ArgumentError, TokenizerError
from .._notices import warn
from .formats import messages_of
from .ollama import modelfile
from .rendering import ChatRenderer, tokenizer_of
from .sources import Row, change_rows, or_error, settle
from .templates import TOKENIZERS_EOS, quoted, with_system_message

INPUT, OUTPUT, SYSTEM = "{INPUT}", "{OUTPUT}", "{SYSTEM}"

LLAMA_3 = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>" + 2 * (
    "<|start_header_id|>user<|end_header_id|>\n\n{INPUT}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{OUTPUT}<|eot_id|>"
)
DEFAULT_SYSTEM = (
    "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
)


class _Parts(NamedTuple):
    """The text around the messages: head (with `{SYSTEM}` or not), before a question, before and after an answer."""

    head: str
    before_input: str
    before_output: str
    after_output: str


def construct_chat_template(
    tokenizer: Any = None,
    chat_template: str = LLAMA_3,
    default_system_message: str | None = DEFAULT_SYSTEM,
    extra_eos_tokens: Sequence[str] | None = None,
) -> tuple[str, str, str, str]:
    """`(ollama_modelfile, jinja, input_part, output_part)` for a template written as text.

    The text shows `{INPUT}` and `{OUTPUT}`, best twice, so that what repeats can be told from what comes once, and
    `{SYSTEM}` before the first where there is a system message. An EOS token missing after `{OUTPUT}` is added, with a
    warning. `extra_eos_tokens` are further stop words, single tokens each. `input_part` and `output_part` open a
    question and an answer, as `train_on_responses_only` takes them.

    Errors: `ArgumentError` for a template whose turns differ or that lacks a field, `TokenizerError` for an extra EOS
    token of several tokens.
    """
    core = tokenizer_of(tokenizer)
    eos, bos = core.eos_token or "", core.bos_token or ""
    extra = tuple(extra_eos_tokens or ())
    for token in extra:
        if len(core(token, add_special_tokens=False)["input_ids"]) != 1:
            raise TokenizerError(f"{token!r} is not a single token", where="extra_eos_tokens")
    text = chat_template.removeprefix(bos) if bos else chat_template
    parts = _parsed(text, (eos, *extra))
    jinja = _jinja(parts, default_system_message)
    message = (default_system_message or "") if SYSTEM in parts.head else None
    file = modelfile(
        jinja, TOKENIZERS_EOS, eos_token=eos, bos_token=bos, system_message=message,
        extra_stops=get_ollama_eos_tokens(core, extra),
    )  # fmt: skip
    return file, jinja, parts.before_input, parts.before_output.removeprefix(parts.after_output.strip())


def apply_chat_template(
    dataset: Any,
    tokenizer: Any = None,
    chat_template: str = LLAMA_3,
    default_system_message: str | None = DEFAULT_SYSTEM,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Any:
    """Give `tokenizer` the template `construct_chat_template` makes, and `dataset` a `text` column rendered with it.

        apply_chat_template(dataset, tokenizer, "{SYSTEM}\\nQ: {INPUT}\\nA: {OUTPUT}\\nQ: {INPUT}\\nA: {OUTPUT}")

    Rows hold `conversations` (or `messages`), in any of the usual spellings. The text begins with the BOS token where
    the tokenizer has one. Sets `tokenizer.chat_template`, its Modelfile and the parts that `train_on_responses_only`
    reads.
    """
    file, jinja, input_part, output_part = construct_chat_template(
        tokenizer, chat_template, default_system_message, extra_eos_tokens
    )
    core = tokenizer_of(tokenizer)
    core.chat_template = tokenizer.chat_template = jinja
    core._ollama_modelfile = tokenizer._ollama_modelfile = file
    core._unsloth_input_part, core._unsloth_output_part = input_part, output_part
    core._system_message = default_system_message
    renderer = ChatRenderer(tokenizer)

    def with_text(row: Row) -> Row:
        return {**row, "text": renderer.render(messages_of(row))}

    def change(rows: list[Row], numbers: Iterable[int]) -> list[Row]:
        results = [or_error(with_text, row, number) for row, number in zip(rows, numbers, strict=True)]
        return settle(results, "raise", "rows can't be rendered", [])

    return change_rows(dataset, change, description="Applying the chat template", keep_columns=True)


def get_ollama_eos_tokens(tokenizer: Any, extra_eos_tokens: Sequence[str] = ()) -> tuple[str, ...]:
    """Stop words for Ollama: the EOS token, the extra ones, and the vocabulary's tokens that end a text or a turn."""
    core = tokenizer_of(tokenizer)
    ends = (
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<turn|>",
        "</s>",
    )
    special = {str(token) for token in core.added_tokens_decoder.values()}
    stops = [core.eos_token, *extra_eos_tokens, *(end for end in ends if end in special)]
    return tuple(dict.fromkeys(stop for stop in stops if stop))


def _parsed(text: str, endings: Sequence[str]) -> _Parts:
    for name in (INPUT, OUTPUT):
        if name not in text:
            raise ArgumentError(
                f"the template has no {name}", where="chat_template", fix=f"{INPUT} ... {OUTPUT}, twice"
            )
    if SYSTEM in text and text.index(SYSTEM) > text.index(INPUT):
        raise ArgumentError(f"{SYSTEM} comes after {INPUT}", where="chat_template", fix=f"put {SYSTEM} first")
    head, _, rest = text.partition(INPUT)
    middle, _, rest = rest.partition(OUTPUT)
    if INPUT not in rest:
        return _single_turn(head, middle, rest, endings)
    between, _, rest = rest.partition(INPUT)
    second_middle, found, tail = rest.partition(OUTPUT)
    if not found or second_middle != middle or INPUT in tail:
        raise ArgumentError(
            f"the two turns differ: {middle!r} and {second_middle!r} stand between {INPUT} and {OUTPUT}",
            where="chat_template", fix="show the same turn twice",
        )  # fmt: skip
    ended = _ended(tail, endings)
    before_input = between.removeprefix(tail) if tail and between.startswith(tail) else between
    if not head.endswith(before_input):
        raise ArgumentError(
            f"the second question opens with {before_input!r} and the first does not",
            where="chat_template", fix="show the same turn twice",
        )  # fmt: skip
    return _Parts(head[: len(head) - len(before_input)], before_input, middle, ended)


def _single_turn(head: str, middle: str, tail: str, endings: Sequence[str]) -> _Parts:
    """With one turn, what repeats is taken to start with the same white space as the answer's heading."""
    gap = middle[: len(middle) - len(middle.lstrip())]
    fixed = head.index(SYSTEM) + len(SYSTEM) if SYSTEM in head else 0
    start = head.rfind(gap, fixed, len(head.rstrip())) if gap else -1
    start = start if start >= 0 else fixed
    return _Parts(head[:start], head[start:], middle, _ended(tail, endings))


def _ended(tail: str, endings: Sequence[str]) -> str:
    eos = endings[0]
    if any(ending and tail.lstrip().startswith(ending) for ending in endings) or not eos:
        return tail
    warn(f"the template has no end of turn after {OUTPUT}, without which a model never stops; {eos!r} was added")
    return eos + tail


def _jinja(parts: _Parts, system_message: str | None) -> str:
    before, found, after = (quoted(text) for text in parts.head.partition(SYSTEM))
    if found:
        head = (
            "{%- if messages[0]['role'] == 'system' %}\n"
            f"    {{{{- '{before}' + messages[0]['content'] + '{after}' }}}}\n"
            "    {%- set turns = messages[1:] %}\n"
            "{%- else %}\n"
            f"    {{{{- '{before}{{system_message}}{after}' }}}}\n"
            "    {%- set turns = messages %}\n"
            "{%- endif %}\n"
        )
        head = with_system_message(head, system_message)
    else:
        head = f"{{{{- '{before}' }}}}\n{{%- set turns = messages %}}\n"
    question, answer, end = quoted(parts.before_input), quoted(parts.before_output), quoted(parts.after_output)
    return (
        "{{- bos_token }}\n"
        f"{head}"
        "{%- for message in turns %}\n"
        "    {%- if message['role'] == 'user' %}\n"
        f"        {{{{- '{question}' + message['content'] }}}}\n"
        "    {%- elif message['role'] == 'assistant' %}\n"
        f"        {{{{- '{answer}' + message['content'] + '{end}' }}}}\n"
        "    {%- else %}\n"
        "        {{- raise_exception('This template takes user and assistant turns"
        + (", and one system message at the start" if found else "")
        + ".') }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        f"    {{{{- '{answer}' }}}}\n"
        "{%- endif %}"
    )

"""`train_on_responses_only`: loss on the answers of a trainer's data, found by structure.

Rows that still have their messages are rendered again, and where that gives the very tokens of the row, the answers are
where the template puts them. Rows that are only tokens are read by what opens and ends an answer in the template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import ArgumentError, DataError, TokenizerError
from .._notices import notice, warn
from .encoding import IGNORED, EncodedRow, RowEncoder
from .formats import conversation_column
from .rendering import ChatRenderer, tokenizer_of
from .response_spans import ResponseFinder
from .sandbox import TemplateError
from .sources import Row, change_rows, column_names, first_row, is_split_dict, is_stream
from .token_text import TokenText

_MOST_LOST = 0.9  # a larger share of rows without an answer is taken for a mistake
_REPLACED_COLLATORS = ("DataCollatorForLanguageModeling", "DataCollatorWithPadding", "default_data_collator")
_TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "token_type_ids", "completion_mask", "assistant_masks")

MaskRow = Callable[[Sequence[int]], list[int]]


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """Take the loss on the assistant's answers only; returns `trainer` with its train and eval data changed.

    What opens and ends an answer comes from the tokenizer's chat template. `instruction_part` and `response_part`, the
    texts that open a question and an answer, override it, for data that did not go through the template. End-of-turn
    tokens are trained. `force_match=False` matches the two texts without the white space around them.
    `last_response_only` trains the last answer of each row. With `return_function` nothing is changed and the function
    from a batch `{"input_ids": [[...]]}` to `{"labels": [[...]]}` is returned; `trainer` may be None then.

    Rows left without a trained token are dropped, counted and told. Rows that `max_length` has cut are counted and told
    where they still have their messages. A doubled BOS token is made single. `num_proc` is accepted and not needed.

        trainer = train_on_responses_only(SFTTrainer(model, train_dataset=dataset, processing_class=tokenizer))
        preview(trainer)

    Errors: `ArgumentError` (a `ValueError`) if only one part is given, `DataError` with a decoded row if nearly all
    rows have no answer, `TokenizerError` without a chat template and parts.
    """
    if num_proc is not None:
        notice(f"fastllm: num_proc={num_proc} is not needed: one process masks the rows", once="data:num_proc")
    tokenizer = tokenizer or getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    if tokenizer is None:
        raise ArgumentError(
            "no tokenizer is known", where="tokenizer", fix="train_on_responses_only(trainer, tokenizer=...)"
        )
    markers = _Markers.choose(tokenizer, instruction_part, response_part, force_match)
    mask = markers.masker(tokenizer, last_response_only)
    if return_function:
        return lambda batch: {"labels": [mask(ids) for ids in batch["input_ids"]]}
    encoder = None
    if markers.from_template:
        encoder = RowEncoder(tokenizer, "last" if last_response_only else "responses")
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name, None)
        if dataset is not None:
            setattr(trainer, name, _masked_dataset(dataset, name, tokenizer, mask, encoder, markers))
    _use_labels(trainer, tokenizer)
    return trainer


@dataclass(frozen=True)
class _Markers:
    """What opens an answer, what ends one, and what opens a question."""

    response: str
    endings: tuple[str, ...]
    instruction: str
    from_template: bool

    @classmethod
    def choose(cls, tokenizer: Any, instruction: str | None, response: str | None, force_match: bool) -> _Markers:
        """The parts given, else those stored by `apply_chat_template`, else those of the chat template."""
        if (instruction is None) != (response is None):
            raise ArgumentError(
                "instruction_part and response_part go together", where="train_on_responses_only",
                fix="give both, or neither to take them from the chat template",
            )  # fmt: skip
        learned = _learned(tokenizer)
        core = tokenizer_of(tokenizer)
        if response is None and getattr(core, "_unsloth_output_part", None):
            instruction, response = core._unsloth_input_part, core._unsloth_output_part
        if response is None or instruction is None:
            if learned is None:
                raise TokenizerError(
                    "the tokenizer has no chat template to tell answers by",
                    fix='train_on_responses_only(trainer, instruction_part="...", response_part="...")',
                )  # fmt: skip
            return learned
        if not response.strip() or not instruction.strip():
            raise ArgumentError("a part is empty", where="train_on_responses_only")
        same_opening = learned is not None and response.strip() == learned.response.strip()
        endings = learned.endings if learned and same_opening else ()
        if not force_match:
            instruction, response = instruction.strip(), response.strip()
        return cls(response, endings, instruction, from_template=bool(same_opening))

    def masker(self, tokenizer: Any, last_only: bool) -> MaskRow:
        """The function from token ids to labels."""
        texts = TokenText(tokenizer)
        opens, asks = texts.pattern(self.response), texts.pattern(self.instruction.strip())
        ends = [texts.pattern(ending) for ending in self.endings if ending.strip()]

        def mask(ids: Sequence[int]) -> list[int]:
            spelled = texts.spell(ids)
            spans = []
            position = 0
            while found := opens.search(spelled.text, position):
                start = found.end()
                asked = asks.search(spelled.text, start)
                limit = asked.start() if asked else len(spelled.text)
                stops = [stop.end() for end in ends if (stop := end.search(spelled.text, start, limit))]
                end = min(stops) if stops else start + len(_without_trailing_space(spelled.text[start:limit]))
                spans.append((start, end))
                position = max(end, found.end())
            labels = [IGNORED] * len(ids)
            for start, end in spans[-1:] if last_only else spans:
                first, after = spelled.tokens(start, end)
                labels[first:after] = ids[first:after]
            return labels

        return mask


def _without_trailing_space(answer: bytes) -> bytes:
    """The answer without the line break a template may write after the end-of-turn token."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(b"\xfe") else answer


def _learned(tokenizer: Any) -> _Markers | None:
    """The markers of the tokenizer's chat template; None where it has none, or none that shows a plain conversation."""
    try:
        finder = ResponseFinder(ChatRenderer(tokenizer))
    except (TokenizerError, TemplateError):
        return None
    opening = finder.opening if finder.opening.strip() else finder.between.strip()
    endings = tuple(dict.fromkeys((finder.ending.strip(), finder.last_ending.strip())))
    return _Markers(opening, endings, finder.question_opening.strip(), from_template=True)


@dataclass
class _Count:
    rows: int = 0
    by_structure: int = 0
    cut: int = 0
    lost: int = 0
    doubled_bos: int = 0
    tokens: int = 0
    trained: int = 0
    sample: Sequence[int] = ()


def _masked_dataset(
    dataset: Any, name: str, tokenizer: Any, mask: MaskRow, encoder: RowEncoder | None, markers: _Markers
) -> Any:
    """The data set, or each of a dict of them, with labels on its answers only."""
    if is_split_dict(dataset):
        return type(dataset)(
            {
                key: _masked_dataset(part, f"{name}[{key!r}]", tokenizer, mask, encoder, markers)
                for key, part in dataset.items()
            }
        )
    count = _Count()
    change = _Masking(tokenizer, mask, encoder, count)
    change.packed, change.streams = "seq_lengths" in column_names(dataset), is_stream(dataset)
    if "input_ids" not in first_row(dataset) and not _can_encode(first_row(dataset)):
        raise DataError(
            f"the data is not tokenised and has neither messages nor text, only {column_names(dataset)}", where=name
        )
    masked = change_rows(dataset, change, description=f"Masking {name}", keep_columns=True)
    if not is_stream(masked):
        _judge(count, name, tokenizer, markers)
    return masked


class _Masking:
    """The change of one batch of a trainer's rows."""

    packed = False
    streams = False  # problems are told when they are met, as no summary will follow

    def __init__(self, tokenizer: Any, mask: MaskRow, encoder: RowEncoder | None, count: _Count) -> None:
        self.tokenizer, self.mask, self.encoder, self.count = tokenizer, mask, encoder, count
        self.bos = getattr(tokenizer_of(tokenizer), "bos_token_id", None)

    def __call__(self, rows: list[Row], numbers: Iterable[int]) -> list[Row]:
        rows = [self._tokenised(row) for row in rows]
        structural = self._by_structure(rows)
        masked = [self._masked(row, found) for row, found in zip(rows, structural, strict=True)]
        return [row for row in masked if row is not None]

    def _tokenised(self, row: Row) -> Row:
        if "input_ids" in row:
            return self._with_single_bos(row)
        encoded = (self.encoder or RowEncoder(self.tokenizer, "all")).encode([row])[0]
        if isinstance(encoded, DataError):
            raise encoded
        return self._with_single_bos({**row, "input_ids": encoded.input_ids})

    def _with_single_bos(self, row: Row) -> Row:
        ids = row["input_ids"]
        if self.bos is None or self.packed or list(ids[:2]) != [self.bos, self.bos]:
            return row
        self.count.doubled_bos += 1
        if self.streams and self.count.doubled_bos == 1:
            warn("rows begin with two BOS tokens; one is removed")
        return {key: value[1:] if key in _TOKEN_COLUMNS and value is not None else value for key, value in row.items()}

    def _by_structure(self, rows: list[Row]) -> list[EncodedRow | None]:
        """The rows rendered and encoded again from their messages, where they have any."""
        if self.encoder is None or self.packed or not all(conversation_column(row) for row in rows):
            return [None] * len(rows)
        sources = [
            {key: value for key, value in row.items() if key not in ("text", "prompt", "completion")} for row in rows
        ]
        return [found if isinstance(found, EncodedRow) else None for found in self.encoder.encode(sources)]

    def _masked(self, row: Row, found: EncodedRow | None) -> Row | None:
        ids, count = row["input_ids"], self.count
        labels = _cut_to(found, ids) if found else None
        count.by_structure += labels is not None
        count.cut += labels is not None and found is not None and len(ids) < len(found.input_ids)
        if labels is None:
            labels = self.mask(ids)
        if row.get("labels") is not None:
            labels = [IGNORED if old == IGNORED else new for new, old in zip(labels, row["labels"], strict=True)]
        trained = len(labels) - labels.count(IGNORED)
        count.rows += 1
        count.tokens += len(ids)
        count.trained += trained
        if not trained:
            count.lost += 1
            if self.streams and count.lost == 1:
                warn(f"rows without a token to train are dropped; the first is number {count.rows - 1} of the stream")
            count.sample = count.sample or ids
            return None
        return {**row, "labels": labels}


def _cut_to(found: EncodedRow, ids: Sequence[int]) -> list[int] | None:
    """The labels of `found` for `ids`, which may be its start or its end; None where they differ."""
    length = len(ids)
    if found.input_ids[:length] == list(ids):
        return found.labels[:length]
    if length and found.input_ids[-length:] == list(ids):
        return found.labels[-length:]
    return None


def _can_encode(row: Row) -> bool:
    return conversation_column(row) is not None or isinstance(row.get("text"), str)


def _judge(count: _Count, name: str, tokenizer: Any, markers: _Markers) -> None:
    """Tell what was masked; raise where nearly nothing is left."""
    if not count.rows:
        raise DataError("the data set has 0 rows", where=name)
    if count.lost >= _MOST_LOST * count.rows:
        sample = tokenizer_of(tokenizer).decode(list(count.sample))
        raise DataError(
            f"{count.lost:,} of {count.rows:,} rows have no answer to train. An answer opens with {markers.response!r} "
            f"and this row shows none: {sample[:300]!r}", where=name,
            fix="if answers were cut off, raise max_length; else check that the data went through this chat template",
        )  # fmt: skip
    how = f", {count.by_structure:,} of them by their messages" if count.by_structure else ""
    notice(
        f"fastllm: {name}: {count.trained / max(count.tokens, 1):.1%} of {count.tokens:,} tokens are trained, in "
        f"{count.rows - count.lost:,} rows{how}"
    )
    if count.lost:
        warn(f"{name}: {count.lost:,} rows without a token to train were dropped")
    if count.cut:
        warn(f"{name}: {count.cut:,} rows are shorter than their messages; a larger max_length would keep them whole")
    if count.doubled_bos:
        warn(f"{name}: {count.doubled_bos:,} rows began with two BOS tokens; one was removed")


def _use_labels(trainer: Any, tokenizer: Any) -> None:
    """Replace a collator that would build labels of its own from the inputs."""
    collator = getattr(trainer, "data_collator", None)
    name = getattr(collator, "__name__", type(collator).__name__)
    module = getattr(collator, "__module__", type(collator).__module__) or ""
    if collator is None or not module.startswith("transformers") or name not in _REPLACED_COLLATORS:
        return
    from transformers import DataCollatorForSeq2Seq

    trainer.data_collator = DataCollatorForSeq2Seq(tokenizer=tokenizer_of(tokenizer))
    notice(f"fastllm: the collator {name} makes its own labels; DataCollatorForSeq2Seq takes its place")

"""A data set of conversations to a data set of `input_ids` and `labels`, ready for any trainer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from .._errors import DataError
from .._notices import notice, warn
from .encoding import IGNORED, EncodedRow, RowEncoder, TrainOn
from .sources import OnError, Row, batches_of, change_rows, check_choice, is_dataset, is_split_dict, is_stream, settle

TooLong = Literal["truncate", "drop", "error"]
Untrained = Literal["drop", "error", "keep"]


@dataclass
class DataReport:
    """What became of the rows: counts over all that have been read so far."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    too_long: int = 0
    untrained: int = 0
    untrained_by_length: int = 0
    first_untrained: list[int] = field(default_factory=list)
    vanished: Counter[str] = field(default_factory=Counter)
    dropped: list[DataError] = field(default_factory=list)

    def __str__(self) -> str:
        share = self.trained_tokens / self.tokens if self.tokens else 0
        lines = [f"{self.rows:,} rows, {self.tokens:,} tokens, {share:.1%} of them trained"]
        if self.truncated:
            lines.append(f"{self.truncated:,} rows were longer than max_length and lost their end")
        if self.too_long:
            lines.append(f"{self.too_long:,} rows were longer than max_length and were left out")
        if self.untrained:
            shown = ", ".join(map(str, self.first_untrained))
            lines.append(
                f"{self.untrained:,} rows have no token to train (rows {shown}...), "
                f"{self.untrained_by_length:,} of them because max_length cut their answer off"
            )
        for role, count in self.vanished.items():
            lines.append(f"{count:,} messages of role {role!r} do not appear in the text: the template leaves them out")
        if self.dropped:
            lines.append(f"{len(self.dropped):,} rows could not be read and were left out; {self.dropped[0]}")
        return "\n".join(lines)


def tokenize_chats(
    dataset: Any,
    tokenizer: Any,
    *,
    train_on: TrainOn = "responses",
    max_length: int | None = None,
    too_long: TooLong = "truncate",
    untrained: Untrained = "drop",
    on_error: OnError = "raise",
    chat_template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    batch_size: int = 1000,
    progress: bool = True,
    report: DataReport | None = None,
) -> Any:
    """Render, tokenise and mask `dataset` in one pass.

    Rows hold `messages` (or `conversations` in any spelling), `prompt` and `completion`, or `text`; `tools` and
    `chat_template_kwargs` of a row are honoured. The result has `input_ids [n]` and `labels [n]`, -100 where no loss is
    taken: a `Dataset` for a `Dataset` or a list, a stream for a stream. TRL and transformers trainers take it as it is.

    `train_on`: `"responses"`, the `"last"` response, messages `"marked"` with `"train": True`, or `"all"` tokens.
    `too_long`: what happens to rows of more than `max_length` tokens. `untrained`: what happens to rows in which no
    token is trained. `on_error="drop"` leaves rows out that can't be read. Whatever is cut or left out is counted in
    `report` and told.

    Errors: `DataError` with the row numbers, `TemplateError` where the template refuses a conversation,
    `TokenizerError` without a chat template.
    """
    check_choice("too_long", too_long, ("truncate", "drop", "error"))
    check_choice("untrained", untrained, ("drop", "error", "keep"))
    check_choice("on_error", on_error, ("raise", "drop"))
    report = report or DataReport()
    limit = max_length if too_long == "truncate" else None
    encoder = RowEncoder(tokenizer, train_on, limit, chat_template, template_kwargs or {})
    work = _Tokenization(encoder, report, max_length, too_long, untrained, on_error)
    if is_stream(dataset) or is_dataset(dataset) or is_split_dict(dataset):
        result = change_rows(
            dataset, work, description="Tokenizing", batch_size=batch_size, features=_features(), progress=progress
        )
    else:
        result = _dataset_of(dataset, work, batch_size, progress)
    if not is_stream(result):
        if not report.rows:
            raise DataError(f"no row is left to train on. {report}", where="data set")
        notice(f"fastllm: {report}")
    return result


class _Tokenization:
    """The change of one batch; keeps count over all batches."""

    def __init__(
        self,
        encoder: RowEncoder,
        report: DataReport,
        max_length: int | None,
        too_long: TooLong,
        untrained: Untrained,
        on_error: OnError,
    ) -> None:
        self.encoder, self.report, self.max_length = encoder, report, max_length
        self.too_long, self.untrained = too_long, untrained
        self.on_error: OnError = on_error

    def __call__(self, rows: list[Row], numbers: Any) -> list[Row]:
        encoded = self.encoder.encode(rows, numbers)
        results = [self._judged(row, number) for row, number in zip(encoded, numbers, strict=True)]
        kept = settle(results, self.on_error, "rows can't be used", self.report.dropped)
        return [row for row in kept if row is not None]

    def _judged(self, row: EncodedRow | DataError, number: int) -> Row | DataError | None:
        """The row as the trainer takes it, None where it is left out, or the reason why the run stops."""
        if isinstance(row, DataError):
            return row
        report = self.report
        for role in row.vanished:
            if not report.vanished[role]:
                warn(f"row {number}: a message of role {role!r} does not appear in the text that the template makes")
            report.vanished[role] += 1
        if self.max_length is not None and len(row.input_ids) > self.max_length:
            if self.too_long == "error":
                return DataError(
                    f"{len(row.input_ids)} tokens, more than max_length={self.max_length}", where=f"row {number}",
                    fix='raise max_length, or pass too_long="truncate" or "drop"',
                )  # fmt: skip
            report.too_long += 1
            return None
        trained = len(row.labels) - row.labels.count(IGNORED)
        if not trained and (problem := self._without_training(row, number)):
            return problem if isinstance(problem, DataError) else None
        report.rows += 1
        report.tokens += len(row.input_ids)
        report.trained_tokens += trained
        report.truncated += row.truncated
        return {"input_ids": row.input_ids, "labels": row.labels}

    def _without_training(self, row: EncodedRow, number: int) -> DataError | bool:
        """Count a row without a trained token; an error or True where it must not be kept."""
        report = self.report
        report.untrained += 1
        report.untrained_by_length += row.truncated
        if len(report.first_untrained) < 5:
            report.first_untrained.append(number)
        if self.untrained == "error":
            reason = f"max_length={self.max_length} cuts off its answer" if row.truncated else "it has no answer"
            return DataError(f"no token of the row is trained: {reason}", where=f"row {number}")
        if report.untrained == 1:
            action = "are left out" if self.untrained == "drop" else "stay, and teach nothing"
            warn(f"rows without a token to train {action}; the first is row {number}")
        return self.untrained == "drop"


def _dataset_of(rows: Any, work: _Tokenization, batch_size: int, progress: bool) -> Any:
    """A `Dataset` of the changed rows, put together batch by batch, so that lists of numbers don't pile up."""
    from datasets import Dataset, concatenate_datasets

    features = _features()
    pieces = []
    for batch, numbers in batches_of(rows, batch_size, "Tokenizing" if progress else None):
        changed = work(batch, numbers)
        columns = {name: [row[name] for row in changed] for name in features}
        pieces.append(Dataset.from_dict(columns, features=features))
    if not pieces:
        raise DataError("the data set has 0 rows", where="data set")
    return concatenate_datasets(pieces)


def _features() -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})

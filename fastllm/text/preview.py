"""What a trainer will see: tokens with those that are trained in colour, how long rows are, how much is trained."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from .._errors import ArgumentError, DataError, reject_unknown
from .encoding import IGNORED, RowEncoder
from .sources import first_row, is_split_dict
from .token_text import TokenText

_MEASURED_ROWS = 10_000
_BUCKETS = 8
_ENCODING = ("train_on", "max_length", "chat_template", "template_kwargs")
_BAR = 40
_GREEN, _DIM, _END = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_CSS = "white-space:pre-wrap;font-family:monospace;border:1px solid #8884;padding:.5em;margin:.3em 0"
_TRAINED_CSS, _MASKED_CSS = "background:#2e7d3233;color:#2e7d32", "opacity:.55"


class Piece(NamedTuple):
    """Some text of a row, of the tokens `ids`, and whether they are trained."""

    text: str
    trained: bool
    ids: tuple[int, ...]


@dataclass
class Preview:
    """Some rows as pieces, and counts over the rows that were measured."""

    rows: list[list[Piece]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    more_rows: bool = False

    @property
    def share_trained(self) -> float:
        """Share of the measured tokens that carry loss."""
        return self.trained_tokens / max(sum(self.lengths), 1)

    def summary(self) -> str:
        """Lengths and shares in one line."""
        ordered = sorted(self.lengths)
        half, most = ordered[len(ordered) // 2], ordered[min(len(ordered) * 95 // 100, len(ordered) - 1)]
        counted = f"{'the first ' if self.more_rows else ''}{len(ordered):,} row{'s' if len(ordered) > 1 else ''}"
        return (
            f"{counted}: {sum(ordered):,} tokens, {self.share_trained:.1%} trained; "
            f"tokens a row: median {half:,}, 95 % below {most + 1:,}, longest {ordered[-1]:,}"
        )

    def histogram(self, block: str = "█") -> str:
        """Rows by their number of tokens, one line a bucket."""
        low, high = min(self.lengths), max(self.lengths)
        width = max(-(-(high - low + 1) // _BUCKETS), 1)
        counts = [0] * (-(-(high - low + 1) // width))
        for length in self.lengths:
            counts[(length - low) // width] += 1
        scale = max(counts)
        return "\n".join(
            f"{low + i * width:>8,} to {low + (i + 1) * width - 1:<8,} {block * (-(-count * _BAR // scale))} {count:,}"
            for i, count in enumerate(counts)
        )

    def text(self, *, color: bool = False, block: str = "█") -> str:
        """For a terminal. Without colour, trained text stands in 【brackets】."""
        rows = [
            f"row {number}: {''.join(_shown(piece, color) for piece in row)}" for number, row in enumerate(self.rows)
        ]
        key = f"{_GREEN}trained{_END}, {_DIM}not trained{_END}" if color else "【trained】, not trained"
        return "\n\n".join([key, *rows, self.histogram(block), self.summary()])

    def html(self) -> str:
        """For a notebook: hover over a stretch for its token ids."""
        rows = []
        for row in self.rows:
            spans = (
                f'<span title="{html.escape(", ".join(map(str, piece.ids[:50])))}" '
                f'style="{_TRAINED_CSS if piece.trained else _MASKED_CSS}">{html.escape(piece.text)}</span>'
                for piece in row
            )
            rows.append(f'<div style="{_CSS}">{"".join(spans)}</div>')
        facts = f"<pre>{html.escape(self.histogram())}\n{html.escape(self.summary())}</pre>"
        key = f'<span style="{_TRAINED_CSS}">trained</span>, <span style="{_MASKED_CSS}">not trained</span>'
        return key + "".join(rows) + facts

    def __str__(self) -> str:
        return self.text()

    def show(self) -> None:
        """Print to the terminal, or display in the notebook."""
        if _in_notebook():
            from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

            display(HTML(self.html()))
            return
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        encoding = sys.stdout.encoding or "ascii"
        plain = "█【】↵".encode(encoding, "ignore").decode(encoding) != "█【】↵"
        text = self.text(color=color, block="#" if plain else "█")
        print(text.encode(encoding, "replace").decode(encoding))


def preview(data: Any, n: int = 3, tokenizer: Any = None, *, show: bool = True, **encoding: Any) -> Preview:
    """Show the first `n` rows of a trainer's training data, or of a data set, with the trained tokens in colour.

    Below them stand a histogram of lengths and the share of tokens that is trained, over up to 10,000 rows. Rows that
    are not tokenised yet are encoded for the purpose, with the arguments of `RowEncoder` in `encoding` (`train_on`,
    `max_length`, `chat_template`). `tokenizer` is needed for a data set. Returns the `Preview`, whose `text()` and
    `html()` can be kept.
    """
    tokenizer = tokenizer or getattr(data, "processing_class", None) or getattr(data, "tokenizer", None)
    dataset = getattr(data, "train_dataset", data)
    reject_unknown("preview", encoding, _ENCODING)
    if tokenizer is None:
        raise ArgumentError("no tokenizer is known", where="preview", fix="preview(dataset, tokenizer=tokenizer)")
    if dataset is None or is_split_dict(dataset):
        raise ArgumentError("expected a trainer or one data set", where="preview", fix='preview(data["train"], ...)')
    encoder = None if "input_ids" in first_row(dataset) else RowEncoder(tokenizer, **encoding)
    texts, result = TokenText(tokenizer), Preview()
    rows = iter(dataset)
    for number, row in enumerate(islice(rows, _MEASURED_ROWS)):
        ids, labels = _encoded(row, encoder, number)
        result.lengths.append(len(ids))
        result.trained_tokens += len(labels) - labels.count(IGNORED)
        if number < n:
            result.rows.append(pieces_of(ids, labels, texts))
    result.more_rows = next(rows, None) is not None
    if show:
        result.show()
    return result


def pieces_of(ids: Sequence[int], labels: Sequence[int], texts: TokenText) -> list[Piece]:
    """The row as stretches of trained and of masked tokens."""
    pieces = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            text = b"".join(map(texts.visible, ids[start:end])).decode("utf-8", "replace")
            pieces.append(Piece(text, labels[start] != IGNORED, tuple(ids[start:end])))
            start = end
    return pieces


def _encoded(row: Any, encoder: RowEncoder | None, number: int) -> tuple[list[int], list[int]]:
    if encoder is None:
        ids = list(row["input_ids"])
        return ids, list(row.get("labels") if row.get("labels") is not None else ids)
    encoded = encoder.encode([row], [number])[0]
    if isinstance(encoded, DataError):
        raise encoded
    return encoded.input_ids, encoded.labels


def _shown(piece: Piece, color: bool) -> str:
    text = piece.text.replace("\n", "↵\n")
    if color:
        return f"{_GREEN if piece.trained else _DIM}{text}{_END}"
    return f"【{text}】" if piece.trained else text


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; IPython in a terminal shows no HTML."""
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ in ("ZMQInteractiveShell", "Shell")

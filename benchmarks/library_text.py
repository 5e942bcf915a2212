"""Text that every machine with Python has: sources and documents of the standard library and of installed packages.

Each file is there once, and a part of the files is held out. Held-out files that repeat training files in most of
their lines are left out: packages copy from each other.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SUFFIXES = (".py", ".pyi", ".md", ".rst")
_SMALLEST, _LARGEST = 500, 400_000  # bytes; larger files are tables and generated code
_LONG_LINE = 20  # characters; shorter lines repeat by chance
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")


@dataclass(frozen=True)
class Text:
    """Whole files, in an order that depends on their content alone."""

    training: list[str]
    held_out: list[str]


def library_text(characters: int, held_out: int, folders: Sequence[Path] | None = None) -> Text:
    """At most `characters` of text to train on, and about `held_out` characters of other files.

    `folders` are those of the standard library and of installed packages where left out.
    """
    paths = sysconfig.get_paths()
    roots = [Path(paths[name]) for name in ("stdlib", "purelib", "platlib")] if folders is None else folders
    files = [text for _, text in sorted(_contents(_files(roots)).items())]
    held, rest = _cut(files, 2 * held_out)
    training, _ = _cut(rest, characters)
    return Text(training, _cut(_not_seen(held, training), held_out)[0])


def _files(roots: Iterable[Path]) -> Iterator[Path]:
    for path in sorted({path.resolve() for root in roots for suffix in _SUFFIXES for path in root.rglob(f"*{suffix}")}):
        if path.is_file() and _SMALLEST <= path.stat().st_size <= _LARGEST:
            yield path


def _contents(files: Iterable[Path]) -> dict[bytes, str]:
    """Each different text by its digest."""
    found = {}
    for path in files:
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            continue
        found[hashlib.sha256(text.encode()).digest()] = text
    return found


def _cut(texts: list[str], characters: int) -> tuple[list[str], list[str]]:
    """The first texts of together at least `characters`, and the rest."""
    total = 0
    for i, text in enumerate(texts):
        if total >= characters:
            return texts[:i], texts[i:]
        total += len(text)
    return texts, []


def _not_seen(held: list[str], training: list[str]) -> list[str]:
    """Those of `held` most of whose long lines are in no training text."""
    lines = [{line for line in text.splitlines() if len(line) >= _LONG_LINE} for text in held]
    wanted = set().union(*lines)
    seen: set[str] = set()
    for text in training:
        seen |= wanted.intersection(text.splitlines())
    return [text for text, own in zip(held, lines, strict=True) if len(own & seen) < 0.5 * len(own)]


def byte_level_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, with `SPECIAL_TOKENS` first: transformers' own class."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    start, end, padding = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=start, eos_token=end, pad_token=padding)


def packed_rows(tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    """All texts one after the other, each with the end of text behind it: int64 [rows, length], the rest cut off."""
    import numpy as np
    import torch

    core, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    parts = []
    for start in range(0, len(texts), 512):
        encodings = core.encode_batch_fast(texts[start : start + 512], add_special_tokens=False)
        parts.extend(np.array([*encoding.ids, end], dtype=np.int32) for encoding in encodings)
    tokens = torch.from_numpy(np.concatenate(parts))
    return tokens[: len(tokens) // length * length].view(-1, length).long()

"""Where rows come from and how a change is applied to all of them: lists, data sets, streams, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .._errors import ArgumentError, DataError, UnsupportedError
from .._notices import warn

Row = dict[str, Any]
OnError = Literal["raise", "drop"]
ChangeBatch = Callable[[list[Row], Sequence[int]], list[Row]]

_SHOWN_ERRORS = 5
_TABLE_READERS = {".csv": ("csv", {}), ".tsv": ("csv", {"delimiter": "\t"}), ".parquet": ("parquet", {})}
_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
KNOWN_ENDINGS = (*_JSON_ENDINGS, *_TABLE_READERS, ".txt")


def is_stream(dataset: Any) -> bool:
    """Whether `dataset` is a `datasets.IterableDataset`, whose rows come one at a time."""
    return hasattr(dataset, "_ex_iterable")


def is_dataset(dataset: Any) -> bool:
    """Whether `dataset` is a map-style `datasets.Dataset`."""
    return hasattr(dataset, "column_names") and hasattr(dataset, "features") and not is_stream(dataset)


def is_split_dict(dataset: Any) -> bool:
    """Whether `dataset` maps the names of splits to data sets."""
    return isinstance(dataset, Mapping)


def like(splits: Any, values: dict[str, Any]) -> Any:
    """`values` as the kind of dict that `splits` is: a `DatasetDict` stays one."""
    return type(splits)(values)


def first_row(dataset: Any) -> Row:
    """The first row. Errors: `DataError` for a data set without rows."""
    row = next(iter(dataset), None)
    if row is None:
        raise DataError("the data set has 0 rows", where="data set")
    if not isinstance(row, Mapping):
        raise DataError(f"a row is {type(row).__name__}, not a dict", where="row 0")
    return dict(row)


def column_names(dataset: Any) -> list[str]:
    """The columns of `dataset`; of a list or an unread stream, those of its first row."""
    return list(getattr(dataset, "column_names", None) or first_row(dataset))


def change_rows(
    dataset: Any,
    change: ChangeBatch,
    *,
    description: str,
    batch_size: int = 1000,
    features: Any = None,
    keep_columns: bool = False,
    progress: bool = True,
) -> Any:
    """`dataset` with `change` applied to batches of rows; it may return fewer rows than it was given.

    A `Dataset` gives a `Dataset`, a stream a stream (read as it is consumed, in constant memory), a dict of splits a
    dict of splits, and any other iterable of rows a list.
    """
    if is_split_dict(dataset):
        changed = {
            name: change_rows(
                split, change, description=f"{description} ({name})", batch_size=batch_size, features=features,
                keep_columns=keep_columns, progress=progress,
            )
            for name, split in dataset.items()
        }  # fmt: skip
        return like(dataset, changed)
    if is_stream(dataset):
        removed = None if keep_columns else column_names(dataset)
        return dataset.map(
            _columnwise(change), batched=True, batch_size=batch_size, with_indices=True, remove_columns=removed,
            features=features,
        )  # fmt: skip
    if is_dataset(dataset):
        return _change_dataset(dataset, change, description, batch_size, features, keep_columns, progress)
    batches = batches_of(dataset, batch_size, description if progress else None)
    return [row for batch, numbers in batches for row in change(batch, numbers)]


def _change_dataset(
    dataset: Any,
    change: ChangeBatch,
    description: str,
    batch_size: int,
    features: Any,
    keep_columns: bool,
    progress: bool,
) -> Any:
    import datasets
    from datasets.fingerprint import generate_random_fingerprint

    bars_were_on = datasets.are_progress_bars_disabled() is False
    if not progress and bars_were_on:
        datasets.disable_progress_bars()
    try:
        # not cached, so no need for a fingerprint of the change, which would pickle the whole tokenizer
        return dataset.map(
            _columnwise(change), batched=True, batch_size=batch_size, with_indices=True, desc=description,
            remove_columns=None if keep_columns else dataset.column_names, features=features,
            load_from_cache_file=False, new_fingerprint=generate_random_fingerprint(),
        )  # fmt: skip
    finally:
        if not progress and bars_were_on:
            datasets.enable_progress_bars()


def _columnwise(change: ChangeBatch) -> Callable[[dict[str, list], list[int]], dict[str, list]]:
    """`change` in the form that `datasets` calls: a dict of columns in, a dict of columns out."""

    def run(columns: dict[str, list], numbers: list[int]) -> dict[str, list]:
        names = list(columns)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        changed = change(rows, numbers)
        keys = dict.fromkeys(key for row in changed for key in row)
        return {key: [row.get(key) for row in changed] for key in keys}

    return run


def batches_of(rows: Iterable[Row], batch_size: int, description: str | None) -> Iterator[tuple[list[Row], range]]:
    """Batches of `rows` with their row numbers, under a progress bar where it has a description."""
    from tqdm.auto import tqdm

    batch: list[Row] = []
    start = 0
    for row in tqdm(rows, desc=description, disable=description is None, unit=" rows", delay=1):
        batch.append(row)
        if len(batch) == batch_size:
            yield batch, range(start, start + len(batch))
            start, batch = start + len(batch), []
    if batch:
        yield batch, range(start, start + len(batch))


def or_error(function: Callable[[Any], Any], value: Any, number: int) -> Any:
    """`function(value)`, or the error why row `number` can't be used. A value that is an error passes through."""
    if isinstance(value, DataError):
        return value
    try:
        return function(value)
    except DataError as error:
        named = type(error)(error.cause, where=error.where or f"row {number}", fix=error.fix)
        named.__cause__ = error.__cause__
        return named
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        named = DataError(f"the row can't be read: {type(error).__name__}: {error}", where=f"row {number}")
        named.__cause__ = error
        return named


def settle(results: Iterable[Any], on_error: OnError, what: str, dropped: list[DataError]) -> list[Any]:
    """The results that are no errors. The others raise together, or join `dropped` and are told about."""
    kept, errors = [], []
    for result in results:
        (errors if isinstance(result, DataError) else kept).append(result)
    if not errors:
        return kept
    if on_error == "raise":
        raise combined(errors, what)
    if not dropped:
        warn(f"rows that can't be used are dropped, as asked. The first: {errors[0]}")
    dropped += errors
    return kept


def combined(errors: Sequence[DataError], what: str) -> DataError:
    """One error for all of a batch, of the type of the first, naming the first few rows."""
    if len(errors) == 1:
        return errors[0]
    listed = "\n".join(f"  {error.where}: {error.cause}" for error in errors[:_SHOWN_ERRORS])
    fix = next((error.fix for error in errors if error.fix), "") or 'mend these rows, or pass on_error="drop"'
    return type(errors[0])(f"{len(errors)} {what}:\n{listed}", where=errors[0].where, fix=fix)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise `ArgumentError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(f"{name}={value!r}", where=name, fix=f"{name} is one of {', '.join(map(repr, choices))}")


def open_rows(source: str | Path, *, split: str = "train", streaming: bool = False) -> Any:
    """The rows of a file, a folder (of files, or written by `Dataset.save_to_disk`), or a data set of the hub.

    JSON comes as an iterable of rows, whatever differs between them; everything else as `datasets` reads it.
    Errors: `DataError` for a file that is missing or broken (with its line), `UnsupportedError` for another ending.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, streaming)
    if not path.exists():
        return _from_hub(str(source), split, streaming)
    return _from_files([path], streaming)


def _from_folder(folder: Path, streaming: bool) -> Any:
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        from datasets import load_from_disk

        return load_from_disk(str(folder))
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in KNOWN_ENDINGS)
    endings = sorted({path.suffix.lower() for path in files})
    if len(endings) == 1:
        return _from_files(files, streaming)
    found = f"files of several kinds: {', '.join(endings)}" if endings else "no file of training data"
    raise DataError(f"the folder has {found}", where=str(folder), fix=f"name one file ({', '.join(KNOWN_ENDINGS)})")


def _from_files(paths: Sequence[Path], streaming: bool) -> Any:
    """The rows of files with the same ending, one file after the other."""
    ending = paths[0].suffix.lower()
    if ending in _JSON_ENDINGS:
        return JsonRows(paths)
    if ending == ".txt":
        return TextLines(paths)
    if ending in _TABLE_READERS:
        from datasets import load_dataset

        reader, options = _TABLE_READERS[ending]
        names = list(map(str, paths))
        return load_dataset(reader, data_files=names, split="train", streaming=streaming, **options)
    fix = f"use {', '.join(KNOWN_ENDINGS)}"
    raise UnsupportedError(f"no reader for {ending!r} files", where=str(paths[0]), fix=fix)


def as_rows(data: Any) -> Any:
    """Tables that are neither data sets nor rows, as a `Dataset`: a pandas data frame, or a dict of columns."""
    from datasets import Dataset

    if hasattr(data, "iloc") and hasattr(data, "to_dict"):
        return Dataset.from_pandas(data, preserve_index=False)
    if isinstance(data, Mapping) and data and all(_is_column(values) for values in data.values()):
        return Dataset.from_dict(dict(data))
    return data


def _is_column(values: Any) -> bool:
    """Whether `values` is a column of a table, not the rows of a split."""
    return isinstance(values, (list, tuple)) and not (values and isinstance(values[0], Mapping))


def _from_hub(name: str, split: str, streaming: bool) -> Any:
    if Path(name).suffix.lower() in KNOWN_ENDINGS or name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise DataError("there is no such file", where=name, fix="check the path; relative ones start at the folder "
                        f"{Path.cwd()}")  # fmt: skip
    from datasets import load_dataset

    return load_dataset(name, split=split, streaming=streaming)


class JsonRows:
    """The rows of JSON files, one object a line or one array of objects, read again each time they are iterated."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[Row]:
        for path in self.paths:
            with path.open(encoding="utf-8-sig") as file:
                start = next((character for line in file for character in line if not character.isspace()), "")
                file.seek(0)
                yield from _array(file, path) if start == "[" else _lines(file, path)


class TextLines:
    """The paragraphs of text files, which blank lines part, each as a row with the column `text`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[Row]:
        for path in self.paths:
            yield from self._paragraphs(path)

    @staticmethod
    def _paragraphs(path: Path) -> Iterator[Row]:
        paragraph: list[str] = []
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    paragraph.append(line)
                elif paragraph:
                    yield {"text": "".join(paragraph).strip("\n")}
                    paragraph = []
        if paragraph:
            yield {"text": "".join(paragraph).strip("\n")}


def _lines(file: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")


def _array(file: Any, path: Path) -> Iterator[Row]:
    for number, row in enumerate(_parsed(file.read(), str(path))):
        yield _object(row, f"{path}, entry {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is no JSON: {error}", where=where, fix="one JSON object a line") from error


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"a row must be a JSON object, not {type(row).__name__}", where=where)
    return row

"""Rows of a list, or of anything with a length and items, where a trainer asks for a `datasets.Dataset`.

Arrow would encode every image of the list into its table, at once and in memory; here each row is given as it is, when
it is its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset


class RowList(Dataset):
    """A data set whose items are the rows of `rows`. Its table holds their numbers only."""

    rows: Sequence[Any]

    def __getitem__(self, key: Any) -> Any:
        numbers = super().__getitem__(key)["number"]
        return self.__getitems__(numbers) if isinstance(numbers, list) else _as_dict(self.rows[numbers])

    def __getitems__(self, keys: list[int]) -> list[Any]:
        return [self[key] for key in keys]

    def __iter__(self) -> Any:
        return (self[number] for number in range(len(self)))


class PackedRows(Sequence):
    """Groups of the rows of a data set, each opened when it is its turn."""

    def __init__(self, rows: Sequence[Any], groups: Sequence[Sequence[int]]) -> None:
        self.rows, self.groups = rows, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return PackedRows(self.rows, self.groups[number])
        return {"packed": [self.rows[row] for row in self.groups[number]]}


def is_rows(dataset: Any) -> bool:
    """Whether it holds rows by number and is no data set of the `datasets` library, nor a dict of several."""
    return (
        dataset is not None
        and not isinstance(dataset, (Dataset, IterableDataset, dict))
        and hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
    )


def rows_dataset(rows: Sequence[Any]) -> RowList:
    numbers = Dataset.from_dict({"number": list(range(len(rows)))})
    dataset = RowList(numbers.data, info=numbers.info)
    dataset.rows = rows
    return dataset


def _as_dict(row: Any) -> Any:
    return {"messages": row} if isinstance(row, (list, tuple)) else row

"""The values that a code can stand for, before it is scaled."""

from __future__ import annotations

from typing import Protocol

import torch


class Grid(Protocol):
    """Ascending values; `low` and `high` are its ends."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...

    def nearest(self, y: torch.Tensor) -> torch.Tensor:
        """The grid value nearest each element of y, fp32. May overwrite y."""
        ...

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """The uint8 codes of grid values."""
        ...


class IntegerGrid:
    """The integers from `low` to `high`; the code of a value counts from `low`."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def nearest(self, y: torch.Tensor) -> torch.Tensor:
        return y.round_().clamp_(self.low, self.high)

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        return (values - self.low).to(torch.uint8)


class CodebookGrid:
    """Any integers, sorted; the code of a value is its index.

    The midpoints of integers are multiples of one half, so a table over cells of that width names the nearest value
    of every y without a search.
    """

    def __init__(self, values: tuple[int, ...]) -> None:
        self.values = values
        self.low, self.high = values[0], values[-1]
        cells = torch.arange(2 * self.low, 2 * self.high + 1) / 2 + 0.25  # the middle of each half-wide cell
        distance = (cells[:, None] - torch.tensor(values)).abs()
        self._table = torch.tensor(values, dtype=torch.float32)[distance.argmin(1)]

    def nearest(self, y: torch.Tensor) -> torch.Tensor:
        cells = y.clamp_(self.low, self.high).sub_(self.low).mul_(2).to(torch.int32)
        return self._table.to(y.device).index_select(0, cells.view(-1)).view(y.shape)

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(self.values[-1] - self.values[0] + 1, dtype=torch.uint8)
        table[torch.tensor(self.values) - self.values[0]] = torch.arange(len(self.values), dtype=torch.uint8)
        index = (values - self.low).to(torch.int32)
        return table.to(values.device).index_select(0, index.view(-1)).view(values.shape)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The fp32 values of uint8 codes."""
        table = torch.tensor(self.values, dtype=torch.float32, device=codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)

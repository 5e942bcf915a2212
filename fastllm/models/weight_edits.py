"""What training changed in one tensor, as an operation on blocks of its rows.

A merge reads a stored tensor W, applies its edits in order in fp32 (fp64 for fp64), and rounds once:
    LoRA      W + s * B A
    DoRA      m / |W + s * B A| * (W + s * B A), the norm of each row (Liu et al., arXiv 2402.09353, section 4.1)
Everything works row by row, so a block of rows is all that has to be in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Part:
    """Where a stored tensor lies in a loaded one: all of it, or rows `start` to `stop` of one expert of a stack."""

    name: str
    expert: int | None = None
    start: int = 0
    stop: int | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a loaded tensor [rows, ...] or [experts, rows, ...]."""
        whole = torch.atleast_1d(tensor) if self.expert is None else tensor[self.expert]
        return whole[self.start : self.stop]


class Edit(Protocol):
    """One change of a tensor. Several adapters make several edits."""

    def apply(self, stored: torch.Tensor, merged: torch.Tensor, start: int) -> torch.Tensor:
        """The new values of the rows from `start` on.

        `stored` are these rows in the checkpoint, `merged` the same after the edits before this one; both float, equal
        in shape. Returns a tensor like them.
        """
        ...

    def part(self, part: Part) -> Edit:
        """The same change seen by a stored tensor that is only a part of the loaded one."""
        ...

    @property
    def identity(self) -> tuple:
        """Equal for two edits that read the same memory: tied tensors with equal edits stay tied."""
        ...


def _like(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return values.detach().to(device=target.device, dtype=target.dtype)


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


@dataclass(frozen=True, eq=False)
class LowRank:
    """`scale * left @ right` is added: left [rows, r], right [r, columns], each with the experts first for a stack."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def update(self, target: torch.Tensor, start: int) -> torch.Tensor:
        """What is added to the rows `target` that begin at `start`."""
        left = _like(self.left[start : start + target.shape[0]], target)
        return (left @ _like(self.right, target)).mul_(self.scale)

    def apply(self, stored: torch.Tensor, merged: torch.Tensor, start: int) -> torch.Tensor:
        return merged + self.update(stored, start)

    def part(self, part: Part) -> LowRank:
        right = self.right if part.expert is None else self.right[part.expert]
        return LowRank(part.of(self.left), right, self.scale)

    @property
    def identity(self) -> tuple:
        return ("low rank", _place(self.left), _place(self.right), self.scale)


@dataclass(frozen=True, eq=False)
class WeightDecomposed:
    """DoRA: the direction of W + `low_rank`, the length `magnitude` [rows].

    The norm is that of the stored weight and this adapter alone, as in PEFT's forward, whatever was merged before.
    """

    low_rank: LowRank
    magnitude: torch.Tensor

    def apply(self, stored: torch.Tensor, merged: torch.Tensor, start: int) -> torch.Tensor:
        update = self.low_rank.update(stored, start)
        magnitude = _like(self.magnitude[start : start + stored.shape[0]], stored)
        factor = magnitude / torch.linalg.vector_norm(stored + update, dim=1)
        return (merged + update) * factor[:, None]

    def part(self, part: Part) -> WeightDecomposed:
        return WeightDecomposed(self.low_rank.part(part), part.of(self.magnitude))

    @property
    def identity(self) -> tuple:
        return ("weight decomposed", self.low_rank.identity, _place(self.magnitude))


@dataclass(frozen=True, eq=False)
class Shift:
    """`scale * values` is added: the bias of an adapter's own."""

    values: torch.Tensor
    scale: float

    def apply(self, stored: torch.Tensor, merged: torch.Tensor, start: int) -> torch.Tensor:
        return merged + self.scale * _like(self.values[start : start + stored.shape[0]], stored)

    def part(self, part: Part) -> Shift:
        return Shift(part.of(self.values), self.scale)

    @property
    def identity(self) -> tuple:
        return ("shift", _place(self.values), self.scale)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `indices` [n] become `values` [n, columns]: tokens trained on their own."""

    indices: torch.Tensor
    values: torch.Tensor

    def apply(self, stored: torch.Tensor, merged: torch.Tensor, start: int) -> torch.Tensor:
        indices = self.indices.to(merged.device) - start
        here = (indices >= 0) & (indices < merged.shape[0])
        return merged.index_copy(0, indices[here], _like(self.values, merged)[here])

    def part(self, part: Part) -> Rows:
        if part.expert is not None or part.start or part.stop is not None:
            raise ValueError("rows of an embedding are not split between stored tensors")
        return self

    @property
    def identity(self) -> tuple:
        return ("rows", tuple(self.indices.tolist()), _place(self.values))


@dataclass(frozen=True, eq=False)
class Replace:
    """The tensor was trained in full and becomes `values`.

    Where a value is still the stored one in `loaded_as`, the dtype it was loaded in, the stored one stays: loading a
    bf16 checkpoint in fp16 changes nothing that was not trained.
    """

    values: torch.Tensor
    loaded_as: torch.dtype

    def apply(self, stored: torch.Tensor, merged: torch.Tensor, start: int) -> torch.Tensor:
        values = self.values[start : start + stored.shape[0]].detach().to(stored.device)
        loaded = stored.to(self.loaded_as).to(values.dtype)
        return torch.where(values == loaded, merged, values.to(merged.dtype))

    def part(self, part: Part) -> Replace:
        return Replace(part.of(self.values), self.loaded_as)

    @property
    def identity(self) -> tuple:
        return ("replace", _place(self.values))

"""Parts of narrow matrices, side by side in one buffer, added up into a matrix of each:  Y = f sum_p X_p

A kernel whose programs each see some of a sum leaves as many parts; here a few are added, scaled, rounded and stored in
one launch, where torch takes one for each of those. Sums are made in a fixed order.

Shapes: parts [P, R, C]; Y [R, r], of any strides, with r of the columns.
Dtypes: parts in fp32, as the sums are; Y in any float dtype.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .dispatch import jit, launch_on, next_power_of_2, tl, triton, use_triton

_MOST_SUMS = 3
_ROWS, _PARTS = 16, 8  # of a program


class PartSum(NamedTuple):
    """Where the sum of the columns from `first` on goes, `factor` times: as many as `out [R, r]` has."""

    out: torch.Tensor
    first: int
    factor: float = 1.0


def add_up(parts: torch.Tensor, sums: Sequence[PartSum]) -> None:
    """Write the sums over the parts `[P, R, C]`, contiguous, to the `out` of each: three at most."""
    if not use_triton(parts):
        total = parts.sum(0)
        for out, first, factor in sums:
            out.copy_(total[:, first : first + out.shape[1]] * factor)
        return
    if not (sums and parts.shape[1]):
        return
    if parts.shape[0] > _PARTS:
        parts = parts.sum(0, keepdim=True)  # torch adds up many of them as fast as memory gives them
    count, rows, columns = parts.shape
    arguments = []
    for out, first, factor in sums:
        arguments += [out, first, out.shape[1], float(factor), *out.stride()]
    arguments += [parts, 0, 0, 1.0, 0, 0] * (_MOST_SUMS - len(sums))
    with launch_on(parts):
        _add_up_kernel[(triton.cdiv(rows, _ROWS),)](
            parts, *arguments, count, rows, columns, ROWS=_ROWS, PARTS=next_power_of_2(count),
            COLUMNS=next_power_of_2(columns), num_warps=4,
        )  # fmt: skip


@jit
def _add_up_kernel(
    parts_ptr,
    out0, first0, rank0, factor0, row_stride0, rank_stride0,
    out1, first1, rank1, factor1, row_stride1, rank_stride1,
    out2, first2, rank2, factor2, row_stride2, rank_stride2,
    count, num_rows, columns, ROWS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    row_live = rows < num_rows
    at = (rows.to(tl.int64) * columns + cols)[None, :, :]
    live = (row_live & (cols < columns))[None, :, :]
    part = tl.arange(0, PARTS)[:, None, None]
    at_part = parts_ptr + part.to(tl.int64) * num_rows * columns + at
    total = tl.sum(tl.load(at_part, mask=(part < count) & live, other=0.0), axis=0)
    _store(out0, rows, cols - first0, row_live, rank0, total * factor0, row_stride0, rank_stride0)
    _store(out1, rows, cols - first1, row_live, rank1, total * factor1, row_stride1, rank_stride1)
    _store(out2, rows, cols - first2, row_live, rank2, total * factor2, row_stride2, rank_stride2)


@jit
def _store(out_ptr, rows, ranks, row_live, rank, value, row_stride, rank_stride):
    """The columns of `value` whose `ranks` are those of a matrix."""
    at = out_ptr + rows.to(tl.int64) * row_stride + ranks * rank_stride
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=row_live & (ranks >= 0) & (ranks < rank))

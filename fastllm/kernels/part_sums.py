"""Parts of narrow matrices, side by side in one buffer, added up into a matrix of each:  Y = f sum_p X_p

A kernel whose programs each see some of a sum leaves as many parts; here all are added in a fixed order, scaled and
rounded in one launch, where torch takes one for each of those.

Shapes: parts [P, R, C]; Y [R, r], of any strides, with r of the columns.
Dtypes: parts in fp32, as the sums are; Y in any float dtype.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .dispatch import jit, launch_on, next_power_of_2, tl, triton, use_triton

_MOST_SUMS = 3
_ROWS, _PARTS = 16, 16


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
    count, rows, columns = parts.shape
    if not (sums and rows):
        return
    arguments = []
    for out, first, factor in (*sums, *[sums[0]] * (_MOST_SUMS - len(sums))):
        arguments += [out, first, out.shape[1], float(factor), *out.stride()]
    widest = max(part.out.shape[1] for part in sums)
    with launch_on(parts):
        _add_up_kernel[(triton.cdiv(rows, _ROWS), len(sums))](
            parts, *arguments, count, rows, columns, ROWS=_ROWS, PARTS=_PARTS, RANK=next_power_of_2(widest),
            num_warps=4,
        )  # fmt: skip


@jit
def _add_up(
    parts_ptr, out_ptr, first, rank, factor, row_stride, rank_stride, count, num_rows, columns,
    ROWS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    live = (rows < num_rows)[:, None] & (ranks < rank)[None, :]
    at = rows[:, None] * columns + first + ranks[None, :]
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(0, count, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None, None]
        value = tl.load(
            parts_ptr + part.to(tl.int64) * num_rows * columns + at[None, :, :],
            mask=(part < count) & live[None, :, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(value, axis=0)
    target = out_ptr + rows.to(tl.int64)[:, None] * row_stride + ranks[None, :] * rank_stride
    tl.store(target, (total * factor).to(out_ptr.dtype.element_ty), mask=live)


@jit
def _add_up_kernel(
    parts_ptr,
    out0, first0, rank0, factor0, row_stride0, rank_stride0,
    out1, first1, rank1, factor1, row_stride1, rank_stride1,
    out2, first2, rank2, factor2, row_stride2, rank_stride2,
    count, num_rows, columns,
    ROWS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    if which == 0:
        _add_up(parts_ptr, out0, first0, rank0, factor0, row_stride0, rank_stride0, count, num_rows, columns,
                ROWS, PARTS, RANK)  # fmt: skip
    elif which == 1:
        _add_up(parts_ptr, out1, first1, rank1, factor1, row_stride1, rank_stride1, count, num_rows, columns,
                ROWS, PARTS, RANK)  # fmt: skip
    else:
        _add_up(parts_ptr, out2, first2, rank2, factor2, row_stride2, rank_stride2, count, num_rows, columns,
                ROWS, PARTS, RANK)  # fmt: skip

"""Rows copied into a wider buffer, and the narrow product that LoRA makes of them, in one pass:

    y = x        y A^T

The large product that comes next reads y beside y A^T. By itself the narrow product would take as long as reading y
does; here each tile is multiplied while it is on its way. A program owns its rows, so every sum has one order.

Shapes: x, y [T, K]; A [E, K] of which `rank` rows count, y A^T [T, E].
Dtypes: one of fp16, bf16, fp32 for y and A, to which x, of any of them, is rounded before it is multiplied; sums are
fp32, rounded once.
Source: the product is that of `lora.py`.
"""

from typing import NamedTuple

import torch

from .dispatch import dot_precision, has_tensor_cores, jit, launch_on, next_power_of_2, tl, triton, use_triton

_MAX_RANK = 64  # more take the registers that the tile is in
# Rows from which one pass is the faster way on a GPU: a program takes some, and fewer leave multiprocessors without.
_LEAST_ROWS = 4096


class Tiling(NamedTuple):
    """The tile that a program computes at a time, and how it is compiled."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# By bytes of an element, of x or y, whichever has more. As many rows as leave every multiprocessor some: A is read once
# for each tile of rows.
_TILINGS = {2: Tiling(32, 128, 4, 3), 4: Tiling(16, 64, 8, 2)}


def serves_rows(x: torch.Tensor, rank: int) -> bool:
    """Whether the kernel can run for rows `x` and pays there: Triton has to know tensor cores."""
    is_long = x.shape[0] >= _LEAST_ROWS or not x.is_cuda
    return use_triton(x) and is_long and 0 < rank <= _MAX_RANK and has_tensor_cores(x)


def copy_with_product(
    x: torch.Tensor,
    a: torch.Tensor,
    rank: int,
    *,
    out: torch.Tensor,
    low_rank: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> None:
    """Write `x [T, K]` to `out` and its product with the first `rank` of `a [E, K]` to `low_rank [T, E]`, zeros past
    them; `kept [T, E]` takes the product, too.

    All are rows with unit stride along their columns, and none overlap.
    """
    if not use_triton(x):
        out.copy_(x)
        multiply_reference(out, a, rank, low_rank)
        if kept is not None:
            kept.copy_(low_rank)
        return
    rows, width = x.shape
    tiling = _TILINGS[max(x.dtype.itemsize, out.dtype.itemsize)]
    copies = low_rank if kept is None else kept
    if rows:
        with launch_on(x):
            _copy_product_kernel[(triton.cdiv(rows, tiling.rows),)](
                x, out, a, low_rank, copies, rows, width, rank, low_rank.shape[1],
                *(t.stride(0) for t in (x, out, a, low_rank, copies)), HAS_KEPT=kept is not None,
                PRECISION=dot_precision(out.dtype), ROWS=tiling.rows, COLUMNS=tiling.columns,
                RANK=padded(rank), EXTENSION=next_power_of_2(low_rank.shape[1]),
                num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            )  # fmt: skip


def padded(rank: int) -> int:
    """As many rows of A as tensor cores take for `rank`."""
    return max(next_power_of_2(rank), 16)


def multiply_reference(y: torch.Tensor, a: torch.Tensor, rank: int, low_rank: torch.Tensor) -> None:
    """The product as the kernels define it: y A^T in `low_rank`, zeros past the rank."""
    low_rank.zero_()
    torch.mm(y, a[:rank].t(), out=low_rank[:, :rank])


@jit
def _copy_product_kernel(
    x_ptr, y_ptr, a_ptr, low_rank_ptr, kept_ptr, num_rows, width, rank, extension,
    x_stride, y_stride, a_stride, low_rank_stride, kept_stride,
    HAS_KEPT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    EXTENSION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = (rows < num_rows)[:, None]
    rows = rows.to(tl.int64)[:, None]
    ranks = tl.arange(0, RANK)[:, None]
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        live = row_live & (cols < width)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=live, other=0.0)
        a = tl.load(a_ptr + ranks * a_stride + cols, mask=(ranks < rank) & (cols < width), other=0.0)
        # In registers, from where each of its two readers gets it in its own layout: both would have to share that of x
        # in shared memory, at a cost in bank conflicts.
        y = tl.where(live, x, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + rows * y_stride + cols, y, mask=live)
        total = tl.dot(y, tl.trans(a), total, input_precision=PRECISION)
    product = total.to(low_rank_ptr.dtype.element_ty)
    store_product(product, low_rank_ptr + rows * low_rank_stride, row_live, rank, extension, RANK, EXTENSION)
    if HAS_KEPT:
        store_product(product, kept_ptr + rows * kept_stride, row_live, rank, extension, RANK, EXTENSION)


@jit
def store_product(product, at, row_live, rank, extension, RANK: tl.constexpr, EXTENSION: tl.constexpr):
    """Store `product [ROWS, RANK]` to the rows that start at `at [ROWS, 1]`, zeros past the rank."""
    ranks = tl.arange(0, RANK)[None, :]
    beyond = tl.arange(0, EXTENSION)[None, :]
    zeros = tl.zeros((product.shape[0], EXTENSION), dtype=product.dtype)
    tl.store(at + beyond, zeros, mask=row_live & (beyond >= rank) & (beyond < extension))
    tl.store(at + ranks, product, mask=row_live & (ranks < rank))

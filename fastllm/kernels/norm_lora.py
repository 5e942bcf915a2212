"""RMSNorm, alone or after a residual addition, and the narrow product that LoRA makes of its rows, in one kernel:

    s = x + residual        y = s / sqrt(mean(s^2) + eps) * (w + offset)        y A^T

By itself the narrow product would take as long as reading y does; here each tile is multiplied while it is in
registers. A program owns its rows. It passes over their columns twice, the second time backwards: what was read or
written last is still in the cache. Every sum has one order, with a residual or without: from s alone come the same y
and the same product.

Shapes: x, residual, s, y [T, K]; w [K]; rstd [T]; A [E, K] of which `rank` rows count, y A^T [T, E].
Dtypes: x, residual and s share one of fp16, bf16, fp32; y and A another or the same, to which y is rounded before it is
multiplied; rstd is fp32; sums are fp32, rounded once.
Source: the norm is that of `rms_norm.py`, the product that of `lora.py`.
"""

import torch

from .copy_lora import Tiling, multiply_reference, padded, store_product
from .dispatch import dot_precision, jit, launch_on, next_power_of_2, tl, triton, use_triton
from .rms_norm import rms_norm_forward

# By bytes of an element, of x or y, whichever has more. As many rows as leave every multiprocessor some: A is read once
# for each tile of rows. In 16 bits, tiles twice as wide spill registers on some GPU.
_TILINGS = {2: Tiling(32, 64, 8, 4), 4: Tiling(16, 64, 8, 2)}


def rms_norm_with_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    a: torch.Tensor,
    rank: int,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    out: torch.Tensor,
    low_rank: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write y, the rows of `x [T, K]` (plus `residual`) normalised, to `out` and its product with the first `rank` of
    `a [E, K]` to `low_rank [T, E]`, zeros past them; `kept [T, E]` takes the product, too.

    All are rows with unit stride along their columns, and none overlap.
    Returns: (s, rstd); s is `x` itself without a residual.
    """
    if not use_triton(x):
        _, total, rstd = rms_norm_forward(x, weight, eps, offset=offset, residual=residual, out=out)
        multiply_reference(out, a, rank, low_rank, kept)
        return total, rstd
    rows, width = x.shape
    weight = weight.contiguous()
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    added = x if residual is None else residual
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tiling = _TILINGS[max(x.dtype.itemsize, out.dtype.itemsize)]
    copies = low_rank if kept is None else kept
    if rows:
        with launch_on(x):
            _norm_product_kernel[(triton.cdiv(rows, tiling.rows),)](
                x, added, weight, total, out, rstd, a, low_rank, copies, rows, width, rank, low_rank.shape[1],
                *(t.stride(0) for t in (x, added, total, out, a, low_rank, copies)), eps, offset,
                HAS_RESIDUAL=residual is not None, HAS_KEPT=kept is not None, PRECISION=dot_precision(out.dtype),
                ROWS=tiling.rows, COLUMNS=tiling.columns, LEVELS=tiling.columns.bit_length() - 1, RANK=padded(rank),
                EXTENSION=next_power_of_2(low_rank.shape[1]), STAGES=tiling.num_stages,
                num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            )  # fmt: skip
    return total, rstd


@jit
def _norm_product_kernel(
    x_ptr, residual_ptr, w_ptr, sum_ptr, y_ptr, rstd_ptr, a_ptr, low_rank_ptr, kept_ptr,
    num_rows, width, rank, extension,
    x_stride, residual_stride, sum_stride, y_stride, a_stride, low_rank_stride, kept_stride, eps, offset,
    HAS_RESIDUAL: tl.constexpr, HAS_KEPT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LEVELS: tl.constexpr, RANK: tl.constexpr, EXTENSION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = (rows < num_rows)[:, None]
    rows = rows.to(tl.int64)[:, None]
    ranks = tl.arange(0, RANK)[:, None]
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        live = row_live & (cols < width)
        s = tl.load(x_ptr + rows * x_stride + cols, mask=live, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            s += tl.load(residual_ptr + rows * residual_stride + cols, mask=live, other=0.0).to(tl.float32)
            rounded = s.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + rows * sum_stride + cols, rounded, mask=live)
            s = rounded.to(tl.float32)
        squares = tl.fma(s, s, squares)
    # In pairs of neighbours, whatever thread has them: how the compiler lays x out has no say in the order.
    for step in tl.static_range(LEVELS):
        squares = tl.sum(tl.reshape(squares, ROWS, COLUMNS >> (step + 1), 2), axis=2)
    rstd = 1.0 / tl.sqrt(squares / width + eps)
    tl.store(rstd_ptr + rows, rstd, mask=row_live)
    if HAS_RESIDUAL:  # threads may read what others wrote of s
        tl.debug_barrier()
    product = tl.zeros((ROWS, RANK), dtype=tl.float32)
    last = (width - 1) // COLUMNS * COLUMNS
    for back in tl.range(0, width, COLUMNS, num_stages=STAGES):
        cols = last - back + tl.arange(0, COLUMNS)[None, :]
        live = row_live & (cols < width)
        s = tl.load(sum_ptr + rows * sum_stride + cols, mask=live, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + cols, mask=cols < width, other=0.0).to(tl.float32) + offset
        a = tl.load(a_ptr + ranks * a_stride + cols, mask=(ranks < rank) & (cols < width), other=0.0)
        y = (s * rstd * w).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + rows * y_stride + cols, y, mask=live)
        product = tl.dot(y, tl.trans(a), product, input_precision=PRECISION)
    product = product.to(low_rank_ptr.dtype.element_ty)
    store_product(product, low_rank_ptr + rows * low_rank_stride, row_live, rank, extension, RANK, EXTENSION)
    if HAS_KEPT:
        store_product(product, kept_ptr + rows * kept_stride, row_live, rank, extension, RANK, EXTENSION)

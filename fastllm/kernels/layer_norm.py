"""LayerNorm, alone or after a residual addition:  y = (x - mean(x)) / sqrt(var(x) + eps) * w + b.

Shapes: x, residual, y [..., D]; w, b [D]; mean, rstd [T] with T the number of rows. The variance is that of the row
itself, divided by D.
Dtypes: x and residual share one; y has `out_dtype` (x's by default); statistics, dw and db are fp32.
Source: Ba et al., "Layer Normalization", arXiv 1607.06450, equation 4.

With a residual the op also returns the sum s = x + residual, rounded to x's dtype, and normalises that rounded sum, so
that a recomputation from s gives the same bits. The variance is taken of the centred row: nothing cancels in rows whose
mean is large.
"""

import torch

from .dispatch import jit, launch_on, next_power_of_2, num_warps_for, rows_of, tl, triton, use_triton, vjp

# Programs of a backward that sums the gradients of w and b, each over many rows.
_MAX_PARTIAL_SUMS = 512


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension, with gradients for x, weight and bias. Returns x's shape and dtype."""
    if use_triton(x):
        return _LayerNorm.apply(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The definition, differentiable: fp32 arithmetic (float64 for float64), rounded once to `out_dtype`."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    centered = x.to(accumulate)
    centered = centered - centered.mean(-1, keepdim=True)
    normed = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(accumulate) + bias.to(accumulate)).to(out_dtype or x.dtype)


def layer_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `x [T, D]` (plus `residual`) normalised, outside autograd.

    `out` may be a strided view (the left part of a wider buffer) and sets the dtype of y.
    Returns: (y, s, mean, rstd); s is `x` itself without a residual.
    """
    rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if not use_triton(x):
        total = x if residual is None else x + residual
        y.copy_(layer_norm_reference(total, weight, bias, eps, out_dtype=y.dtype))
        wide = total.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean(-1)
        return y, total, mean, torch.rsqrt((wide - mean[:, None]).square().mean(-1) + eps)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    added = x if residual is None else residual
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block, rows_per_program, num_warps = _tile(width)
    if rows:
        with launch_on(x):
            _layer_norm_fwd_kernel[(triton.cdiv(rows, rows_per_program),)](
                x, added, weight.contiguous(), bias.contiguous(), total, y, mean, rstd, rows, width,
                x.stride(0), added.stride(0), total.stride(0), y.stride(0), eps,
                HAS_RESIDUAL=residual is not None, ROWS=rows_per_program, BLOCK=block, num_warps=num_warps,
            )  # fmt: skip
    return y, total, mean, rstd


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    *,
    residual_grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    needs_parameter_grads: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `layer_norm_forward` for its normalised input (s), weight and bias.

    `residual_grad`, the gradient that reaches s by the other branch, is added in fp32 before dx is rounded.
    Returns: (dx [T, D] in x's dtype, in `out` where given; dw and db [D] fp32, or None both).
    """
    rows, width = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if not use_triton(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        inputs = (x.to(wide), weight.to(wide), torch.zeros_like(weight, dtype=wide))
        grad_x, dw, db = vjp(lambda a, w, b: layer_norm_reference(a, w, b, eps), inputs, dy.to(wide))
        assert grad_x is not None
        dx.copy_(grad_x if residual_grad is None else grad_x + residual_grad)
        return (dx, dw, db) if needs_parameter_grads else (dx, None, None)
    block, rows_per_program, num_warps = _tile(width)
    programs = -(-rows // rows_per_program)
    if needs_parameter_grads:  # each program walks over many rows and keeps its share of dw and db in registers
        programs = min(programs, _MAX_PARTIAL_SUMS)
    partial = torch.empty(2, programs if needs_parameter_grads else 1, width, dtype=torch.float32, device=x.device)
    added = dy if residual_grad is None else residual_grad
    if rows:
        with launch_on(x):
            _layer_norm_bwd_kernel[(programs,)](
                dy, x, weight.contiguous(), mean, rstd, added, dx, partial[0], partial[1], rows, width,
                dy.stride(0), x.stride(0), added.stride(0), dx.stride(0),
                HAS_RESIDUAL=residual_grad is not None, NEEDS_PARAMETERS=needs_parameter_grads,
                ROWS=rows_per_program, BLOCK=block, num_warps=num_warps,
            )  # fmt: skip
    if not needs_parameter_grads:
        return dx, None, None
    dw, db = partial.sum(1)
    return dx, dw, db


def _tile(width: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program: whole rows, several of them where rows are short."""
    block = next_power_of_2(width)
    rows_per_program = max(1, 2048 // block)
    return block, rows_per_program, num_warps_for(block * rows_per_program)


@jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr, num_rows, width,
    x_stride, residual_stride, sum_stride, y_stride, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    row_live, col_live = rows < num_rows, cols < width
    live = row_live[:, None] & col_live[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask=live, other=0.0).to(
            tl.float32
        )
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows[:, None] * sum_stride + cols[None, :], rounded, mask=live)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    centered = tl.where(live, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / width + eps)
    tl.store(mean_ptr + rows, mean, mask=row_live)
    tl.store(rstd_ptr + rows, rstd, mask=row_live)
    w = tl.load(w_ptr + cols, mask=col_live, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + cols, mask=col_live, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(y_ptr + rows[:, None] * y_stride + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=live)


@jit
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, residual_ptr, dx_ptr, dw_ptr, db_ptr, num_rows, width,
    dy_stride, x_stride, residual_stride, dx_stride,
    HAS_RESIDUAL: tl.constexpr, NEEDS_PARAMETERS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    col_live = cols < width
    w = tl.load(w_ptr + cols, mask=col_live, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    db = tl.zeros((BLOCK,), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0).to(tl.int64) * ROWS
    while start < num_rows:
        rows = start + tl.arange(0, ROWS)
        row_live = rows < num_rows
        live = row_live[:, None] & col_live[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=row_live, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_live, other=0.0)
        normed = tl.where(live, (x - mean[:, None]) * rstd[:, None], 0.0)
        scaled = dy * w[None, :]
        along = tl.sum(scaled * normed, axis=1) / width
        level = tl.sum(scaled, axis=1) / width
        dx = (scaled - normed * along[:, None] - level[:, None]) * rstd[:, None]
        if HAS_RESIDUAL:
            at = residual_ptr + rows[:, None] * residual_stride + cols[None, :]
            dx += tl.load(at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * dx_stride + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live)
        if NEEDS_PARAMETERS:
            dw += tl.sum(dy * normed, axis=0)
            db += tl.sum(dy, axis=0)
        start += step
    if NEEDS_PARAMETERS:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * width + cols, dw, mask=col_live)
        tl.store(db_ptr + tl.program_id(0).to(tl.int64) * width + cols, db, mask=col_live)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        rows = rows_of(x)
        y, _, mean, rstd = layer_norm_forward(rows, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx, dw, db = layer_norm_backward(
            rows_of(dy), rows_of(x), weight, mean, rstd, ctx.eps, needs_parameter_grads=needs_weight or needs_bias
        )
        dw = dw.to(weight.dtype) if dw is not None and needs_weight else None
        db = db.to(bias.dtype) if db is not None and needs_bias else None
        return dx.view(x.shape), dw, db, None

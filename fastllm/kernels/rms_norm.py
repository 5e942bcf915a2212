"""RMSNorm, alone or after a residual addition:  y = x / sqrt(mean(x^2) + eps) * (w + offset).

Shapes: x, residual, y [..., D]; w [D]; rstd [T] with T the number of rows.
Dtypes: x and residual share one; y has `out_dtype` (x's by default); statistics, rstd and dw are fp32.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4. Gemma uses offset 1.

With a residual the op also returns the sum s = x + residual, rounded to x's dtype, and normalises that rounded sum, so
that a recomputation from s gives the same bits.
"""

import torch

from .dispatch import jit, launch_on, next_power_of_2, num_warps_for, rows_of, tl, triton, use_triton, vjp


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0) -> torch.Tensor:
    """RMSNorm over the last dimension, with gradients for x and weight. Returns a tensor of x's shape and dtype."""
    if use_triton(x):
        return _RMSNorm.apply(x, weight, eps, offset)
    return rms_norm_reference(x, weight, eps, offset=offset)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The definition, differentiable: fp32 arithmetic (float64 for float64), rounded once to `out_dtype`."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(accumulate)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.to(accumulate) + offset)).to(out_dtype or x.dtype)


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `x [T, D]` (plus `residual`) normalised, outside autograd.

    `out` may be a strided view (the left part of a wider buffer) and sets the dtype of y.
    Returns: (y, s, rstd); s is `x` itself without a residual.
    """
    rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if not use_triton(x):
        total = x if residual is None else x + residual
        y.copy_(rms_norm_reference(total, weight, eps, offset=offset, out_dtype=y.dtype))
        accumulate = torch.promote_types(x.dtype, torch.float32)
        rstd = torch.rsqrt(total.to(accumulate).square().mean(-1) + eps)
        return y, total, rstd
    weight = weight.contiguous()
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    added = x if residual is None else residual
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block, rows_per_program, num_warps = _tile(width)
    if rows:
        with launch_on(x):
            _rms_norm_fwd_kernel[(triton.cdiv(rows, rows_per_program),)](
                x, added, weight, total, y, rstd, rows, width,
                x.stride(0), added.stride(0), total.stride(0), y.stride(0), eps, offset,
                HAS_RESIDUAL=residual is not None, ROWS=rows_per_program, BLOCK=block, num_warps=num_warps,
            )  # fmt: skip
    return y, total, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual_grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    needs_weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `rms_norm_forward` for its normalised input (s) and weight.

    `residual_grad`, the gradient that reaches s by the other branch, is added in fp32 before dx is rounded.
    Returns: (dx [T, D] in x's dtype, in `out` where given; dw [D] fp32 or None).
    """
    rows, width = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if not use_triton(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_x, grad_w = vjp(
            lambda a, b: rms_norm_reference(a, b, eps, offset=offset), (x.to(wide), weight.to(wide)), dy.to(wide)
        )
        assert grad_x is not None
        dx.copy_(grad_x if residual_grad is None else grad_x + residual_grad)
        return dx, grad_w if needs_weight_grad else None
    weight = weight.contiguous()
    block, rows_per_program, num_warps = _tile(width)
    programs = -(-rows // rows_per_program)
    if needs_weight_grad:  # each program walks over many rows and keeps its share of dw in registers
        programs = min(programs, 512)
    partial_dw = torch.empty(programs if needs_weight_grad else 1, width, dtype=torch.float32, device=x.device)
    added = dy if residual_grad is None else residual_grad
    if rows:
        with launch_on(x):
            _rms_norm_bwd_kernel[(programs,)](
                dy, x, weight, rstd, added, dx, partial_dw, rows, width,
                dy.stride(0), x.stride(0), added.stride(0), dx.stride(0), offset,
                HAS_RESIDUAL=residual_grad is not None, NEEDS_DW=needs_weight_grad,
                ROWS=rows_per_program, BLOCK=block, num_warps=num_warps,
            )  # fmt: skip
    return dx, partial_dw.sum(0) if needs_weight_grad else None


def _tile(width: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program: whole rows, several of them where rows are short."""
    block = next_power_of_2(width)
    rows_per_program = max(1, 2048 // block)
    return block, rows_per_program, num_warps_for(block * rows_per_program)


@jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, sum_ptr, y_ptr, rstd_ptr, num_rows, width,
    x_stride, residual_stride, sum_stride, y_stride, eps, offset,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    live = (rows < num_rows)[:, None] & (cols < width)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask=live, other=0.0).to(
            tl.float32
        )
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows[:, None] * sum_stride + cols[None, :], rounded, mask=live)
        x = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    w = tl.load(w_ptr + cols, mask=cols < width, other=0.0).to(tl.float32) + offset
    y = (x * rstd[:, None] * w[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * y_stride + cols[None, :], y, mask=live)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, residual_ptr, dx_ptr, dw_ptr, num_rows, width,
    dy_stride, x_stride, residual_stride, dx_stride, offset,
    HAS_RESIDUAL: tl.constexpr, NEEDS_DW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    col_live = cols < width
    w = tl.load(w_ptr + cols, mask=col_live, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0).to(tl.int64) * ROWS
    while start < num_rows:
        rows = start + tl.arange(0, ROWS)
        live = (rows < num_rows)[:, None] & col_live[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normed = x * rstd[:, None]
        scaled = dy * w[None, :]
        dx = (scaled - normed * (tl.sum(scaled * normed, axis=1) / width)[:, None]) * rstd[:, None]
        if HAS_RESIDUAL:
            at = residual_ptr + rows[:, None] * residual_stride + cols[None, :]
            dx += tl.load(at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * dx_stride + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live)
        if NEEDS_DW:
            dw += tl.sum(dy * normed, axis=0)
        start += step
    if NEEDS_DW:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * width + cols, dw, mask=col_live)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        rows = rows_of(x)
        y, _, rstd = rms_norm_forward(rows, weight, eps, offset=offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.offset = eps, offset
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dw = rms_norm_backward(
            rows_of(dy), rows_of(x), weight, rstd, ctx.eps, offset=ctx.offset,
            needs_weight_grad=ctx.needs_input_grad[1],
        )  # fmt: skip
        return dx.view(x.shape), None if dw is None else dw.to(weight.dtype), None, None

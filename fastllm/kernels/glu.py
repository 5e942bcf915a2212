"""Gated linear unit:  h = act(gate) * up,  with act one of `activation.ACTIVATIONS`.

Shapes: gate, up, h [..., F].  Dtypes: any float dtype in and out; the arithmetic is fp32 and rounds once.
Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 5.
"""

import torch

from .activation import activate, activation_reference, require_known
from .dispatch import compiles_to_ptx, jit, launch_on, rows_of, tl, triton, use_triton, vjp

_BLOCK = 1024


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up `[..., F]` in gate's dtype, with gradients for both. Other activations raise a ValueError."""
    if use_triton(gate):
        return _Glu.apply(gate, up, activation)
    return glu_reference(gate, up, activation)


def glu_reference(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """The definition, differentiable: fp32 arithmetic (float64 for float64), one rounding."""
    accumulate = torch.promote_types(gate.dtype, torch.float32)
    acted = activation_reference(gate, activation, out_dtype=accumulate)
    return (acted * up.to(accumulate)).to(gate.dtype)


def glu_forward(
    gate: torch.Tensor, up: torch.Tensor, activation: str, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows `[T, F]`, outside autograd; gate, up and out may be column slices of wider buffers."""
    require_known(activation)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    if not use_triton(gate):
        return out.copy_(glu_reference(gate, up, activation))
    rows, width = gate.shape
    if rows:
        with launch_on(gate):
            _glu_fwd_kernel[(rows, triton.cdiv(width, _BLOCK))](
                gate, up, out, width, gate.stride(0), up.stride(0), out.stride(0),
                ACTIVATION=activation, PTX=compiles_to_ptx(gate), BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
    return out


def glu_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    *,
    h_out: torch.Tensor | None = None,
) -> None:
    """Write the gradients of gate and up into `dgate` and `dup`, and h itself into `h_out` where given.

    Outputs may overlay the inputs of the same shape (dgate on gate, dup on up, h_out on dh).
    """
    if not use_triton(gate):
        h = glu_reference(gate, up, activation) if h_out is not None else None
        grads = vjp(lambda a, b: glu_reference(a, b, activation), (gate, up), dh)
        for target, value in zip((dgate, dup, h_out), (*grads, h), strict=True):
            if target is not None and value is not None:
                target.copy_(value)
        return
    rows, width = gate.shape
    h_target = dh if h_out is None else h_out
    if rows:
        with launch_on(gate):
            _glu_bwd_kernel[(rows, triton.cdiv(width, _BLOCK))](
                dh, gate, up, dgate, dup, h_target, width,
                dh.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0), h_target.stride(0),
                ACTIVATION=activation, PTX=compiles_to_ptx(gate), STORE_H=h_out is not None, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip


@jit
def _glu_fwd_kernel(
    gate_ptr, up_ptr, h_ptr, width, gate_stride, up_stride, h_stride,
    ACTIVATION: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < width
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=live, other=0.0).to(tl.float32)
    acted, _ = activate(gate, ACTIVATION, PTX)
    tl.store(h_ptr + row * h_stride + cols, (acted * up).to(h_ptr.dtype.element_ty), mask=live)


@jit
def _glu_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, width,
    dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, h_stride,
    ACTIVATION: tl.constexpr, PTX: tl.constexpr, STORE_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < width
    dh = tl.load(dh_ptr + row * dh_stride + cols, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=live, other=0.0).to(tl.float32)
    acted, slope = activate(gate, ACTIVATION, PTX)
    tl.store(dgate_ptr + row * dgate_stride + cols, (dh * up * slope).to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(dup_ptr + row * dup_stride + cols, (dh * acted).to(dup_ptr.dtype.element_ty), mask=live)
    if STORE_H:
        tl.store(h_ptr + row * h_stride + cols, (acted * up).to(h_ptr.dtype.element_ty), mask=live)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_forward(rows_of(gate), rows_of(up), activation).view(gate.shape)

    @staticmethod
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        glu_backward(rows_of(dh), rows_of(gate), rows_of(up), ctx.activation, rows_of(dgate), rows_of(dup))
        return dgate, dup, None

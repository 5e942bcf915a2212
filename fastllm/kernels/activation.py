"""Element-wise activations:  y = act(x),  with act one of SiLU, GELU (exact), GELU (tanh) and quick GELU.

Shapes: x, y [..., F].  Dtypes: any float dtype in and out; the arithmetic is fp32 and rounds once.
Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, section 2: quick GELU is its
x * sigmoid(1.702 x).
"""

import torch
import torch.nn.functional as F

from .dispatch import compiles_to_ptx, jit, launch_on, rows_of, tl, triton, use_triton, vjp

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu")
_BLOCK = 1024


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """act(x) in x's shape and dtype, with its gradient. A name not of `ACTIVATIONS` raises a ValueError."""
    if use_triton(x):
        return _Activation.apply(x, name)
    return activation_reference(x, name)


def activation_reference(x: torch.Tensor, name: str, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The definition, differentiable: fp32 arithmetic (float64 for float64), rounded once to `out_dtype`."""
    require_known(name)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if name == "silu":
        acted = F.silu(wide)
    elif name == "quick_gelu":
        acted = wide * torch.sigmoid(1.702 * wide)
    else:
        acted = F.gelu(wide, approximate="tanh" if name == "gelu_tanh" else "none")
    return acted.to(out_dtype or x.dtype)


def activation_forward(x: torch.Tensor, name: str, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows `[T, F]`, outside autograd; x and out may be column slices of wider buffers."""
    require_known(name)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not use_triton(x):
        return out.copy_(activation_reference(x, name))
    rows, width = x.shape
    if rows:
        with launch_on(x):
            _activation_fwd_kernel[(rows, triton.cdiv(width, _BLOCK))](
                x, out, width, x.stride(0), out.stride(0), ACTIVATION=name, PTX=compiles_to_ptx(x), BLOCK=_BLOCK,
                num_warps=4,
            )  # fmt: skip
    return out


def activation_backward(
    dy: torch.Tensor, x: torch.Tensor, name: str, dx: torch.Tensor, *, y_out: torch.Tensor | None = None
) -> None:
    """Write the gradient of x into `dx`, and y itself into `y_out` where given.

    Outputs may overlay the inputs (dx on x, y_out on dy).
    """
    if not use_triton(x):
        y = activation_reference(x, name) if y_out is not None else None
        (grad,) = vjp(lambda value: activation_reference(value, name), (x,), dy)
        assert grad is not None
        dx.copy_(grad)
        if y_out is not None and y is not None:
            y_out.copy_(y)
        return
    rows, width = x.shape
    y_target = dy if y_out is None else y_out
    if rows:
        with launch_on(x):
            _activation_bwd_kernel[(rows, triton.cdiv(width, _BLOCK))](
                dy, x, dx, y_target, width, dy.stride(0), x.stride(0), dx.stride(0), y_target.stride(0),
                ACTIVATION=name, PTX=compiles_to_ptx(x), STORE_Y=y_out is not None, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip


def require_known(name: str) -> None:
    """Raise a ValueError for a name that is not of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")


@jit
def activate(x, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """act(x) and its derivative, in fp32, in `PTX` where the kernel may hold some."""
    if ACTIVATION == "silu":
        sigmoid = sigmoid_of(x, PTX)
        acted = x * sigmoid
        slope = sigmoid + acted * (1.0 - sigmoid)
    elif ACTIVATION == "quick_gelu":
        sigmoid = sigmoid_of(1.702 * x, PTX)
        acted = x * sigmoid
        slope = sigmoid + 1.702 * acted * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        acted = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # 0.5 * (1 + tanh(z)) = sigmoid(2 z), which does not overflow; sigmoid(-2 z) is 1 - that, without cancellation
        half = sigmoid_of(2.0 * inner, PTX)
        acted = x * half
        rise = 2.0 * half * sigmoid_of(-2.0 * inner, PTX)
        slope = half + x * rise * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return acted, slope


@jit
def exp_of(x, PTX: tl.constexpr):
    """exp(x) in fp32."""
    return _power_of_2(x * 1.4426950408889634) if PTX else tl.exp(x)


@jit
def sigmoid_of(x, PTX: tl.constexpr):
    """1 / (1 + exp(-x)) in fp32."""
    if PTX:
        divisor = 1.0 + _power_of_2(x * -1.4426950408889634)
        sigmoid = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        sigmoid = tl.sigmoid(x)
    return sigmoid


@jit
def _power_of_2(x):
    """2^x in PTX, without Triton's instructions for results below 2^-126, which become zero."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@jit
def _activation_fwd_kernel(
    x_ptr, y_ptr, width, x_stride, y_stride, ACTIVATION: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < width
    x = tl.load(x_ptr + row * x_stride + cols, mask=live, other=0.0).to(tl.float32)
    acted, _ = activate(x, ACTIVATION, PTX)
    tl.store(y_ptr + row * y_stride + cols, acted.to(y_ptr.dtype.element_ty), mask=live)


@jit
def _activation_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, y_ptr, width, dy_stride, x_stride, dx_stride, y_stride,
    ACTIVATION: tl.constexpr, PTX: tl.constexpr, STORE_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < width
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + cols, mask=live, other=0.0).to(tl.float32)
    acted, slope = activate(x, ACTIVATION, PTX)
    tl.store(dx_ptr + row * dx_stride + cols, (dy * slope).to(dx_ptr.dtype.element_ty), mask=live)
    if STORE_Y:
        tl.store(y_ptr + row * y_stride + cols, acted.to(y_ptr.dtype.element_ty), mask=live)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name):
        ctx.save_for_backward(x)
        ctx.name = name
        return activation_forward(rows_of(x), name).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        activation_backward(rows_of(dy), rows_of(x), ctx.name, rows_of(dx))
        return dx, None

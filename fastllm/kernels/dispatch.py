"""Which implementation an op runs: its Triton kernels, or its plain PyTorch reference.

Every op asks `use_triton(x)` once. Triton runs on CUDA, ROCm and XPU tensors where the package is installed; the
reference runs everywhere else, and is what the tests compare the kernels with. Kernel files import `jit`, `tl`,
`triton` and `TensorDescriptor` from here, so they can be imported on machines without Triton.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .._device import info_of

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
    HAS_TRITON = True
except ImportError:  # macOS, Windows: the kernels below are never launched, only defined
    HAS_TRITON = False

    class _Undefined:
        """Stands for `triton` and `tl`, so that kernel definitions can be read."""

        constexpr = object

        def __getattr__(self, name: str) -> Any:
            return self

    triton: Any = _Undefined()
    tl: Any = _Undefined()
    TensorDescriptor: Any = _Undefined()

    def jit(function: Any) -> Any:
        return function


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A plain global: the backward of CUDA tensors runs in autograd's own threads, which see no context variable.
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force `"triton"` or `"reference"` for the ops called inside; `"auto"` restores the choice by device.

    Forcing Triton on CPU tensors needs Triton's interpreter: set `TRITON_INTERPRET=1` before fastllm is imported.
    """
    if name not in ("triton", "reference", "auto"):
        raise ValueError(f"backend must be 'triton', 'reference' or 'auto', got {name!r}")
    global _forced
    before, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = before


def use_triton(x: torch.Tensor) -> bool:
    """Whether ops on `x` launch Triton kernels. Always false for dtypes that the kernels do not take (float64)."""
    if not HAS_TRITON or x.dtype not in _KERNEL_DTYPES:
        return False
    if _forced is not None:
        return _forced == "triton"
    return x.is_cuda or x.is_xpu


def has_tensor_cores(x: torch.Tensor) -> bool:
    """Whether Triton knows the matrix units of the GPU that `x` is on; of others than NVIDIA's and AMD's, always."""
    return not x.is_cuda or info_of(x.device).has_tensor_core_dot


def is_hopper(x: torch.Tensor) -> bool:
    """Whether `x` is on an NVIDIA GPU of capability 9: tiles and ways of its own pay there."""
    return torch.version.hip is None and info_of(x.device).capability[0] == 9


def launch_on(x: torch.Tensor) -> AbstractContextManager:
    """Context in which Triton launches on `x`'s device: it launches on the current one, not on its arguments'."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    if x.is_xpu and x.device.index != torch.xpu.current_device():
        return torch.xpu.device(x.device)
    return nullcontext()


def compiles_to_ptx(x: torch.Tensor) -> bool:
    """Whether kernels launched on `x` are compiled for an NVIDIA GPU, so that they may hold PTX."""
    return not (x.is_xpu or torch.version.hip is not None or triton.knobs.runtime.interpret)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, and at least 1."""
    return 1 << (max(n, 1) - 1).bit_length()


def num_warps_for(elements: int) -> int:
    """Warps for a program that holds `elements` values: about 16 a thread, between one warp and sixteen."""
    return min(max(next_power_of_2(elements) // 512, 1), 16)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: fp32 products in three passes of NVIDIA's tensor cores, each with a part of the
    bits; AMD's take fp32."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x [..., D]` as `[T, D]` with unit stride along D: a view where the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def vjp(function: Any, inputs: tuple[torch.Tensor, ...], grads: Any) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `function(*inputs)`, a tensor or a tuple of tensors, for upstream `grads`: the backward of an op on
    the reference path. Inputs of integer dtype get None."""
    with torch.enable_grad(), no_autocast(inputs[0].device.type):
        leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
        outputs = function(*leaves)
        wanted = tuple(leaf for leaf in leaves if leaf.requires_grad)
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def no_autocast(device_type: str) -> AbstractContextManager:
    """Context without autocast: ops inside state their dtypes themselves."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def compute_dtype(x: torch.Tensor, preferred: torch.dtype | None = None) -> torch.dtype:
    """The dtype that a linear layer applied to `x` computes in: autocast's where it is on, else `preferred` (that of
    its weights), else that of `x`."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return preferred or x.dtype

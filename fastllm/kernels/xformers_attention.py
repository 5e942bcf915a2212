"""Attention through an installed xformers, for GPUs on which torch has no flash kernel (Turing and older).

    out = softmax(scaling * q k^T) v, with a causal mask or none

Its forward and backward are two functions, as the decoder layer needs them, without dropout. Grouped heads work in
xformers' forward only, so key and value heads come here as many as query heads.

Shapes: q, k, v, out [B, H, S, E], unit stride along E; xformers' own layout is [B, S, H, E].
Dtypes: fp16, and bf16 from Ampere on; the softmax and its statistics are fp32.
Source: Lefaudeux et al., "xFormers", https://github.com/facebookresearch/xformers.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch

from .._device import info_of
from .._notices import notice, warn

# Compute capabilities that its kernels cover; later ones have torch's own flash and cuDNN kernels.
_CAPABILITIES = ((5, 0), (9, 0))


@functools.cache
def xformers_ops() -> Any | None:
    """xformers' functions, or None where it is absent or does not load (told once: it is built for one torch)."""
    if importlib.util.find_spec("xformers") is None:
        return None
    try:
        return importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:
        warn(f"xformers is installed but does not load, so attention goes without it: {error}", once="xformers:broken")
        return None


@functools.cache
def xformers_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the installed xformers has kernels for a device and dtype. Where its extension is built for another torch
    or without CUDA it loads all the same, so one small call asks (and is told about once where it fails)."""
    ops = xformers_ops()
    if ops is None:
        return False
    probe = torch.zeros(1, 8, 1, 64, dtype=dtype, device=device)
    try:
        ops.memory_efficient_attention_forward_requires_grad(probe, probe, probe, attn_bias=_bias(True), scale=1.0)
    except NotImplementedError:
        warn(
            f"xformers is installed but has no {str(dtype).removeprefix('torch.')} attention for this GPU and torch, "
            "so attention goes without it; `python -m xformers.info` shows what it was built for",
            once=f"xformers:{dtype}",
        )
        return False
    return True


def xformers_serves(q: torch.Tensor, dropout: float) -> bool:
    """Whether a case of CUDA queries `q`, fp16 or bf16, can run through xformers here."""
    capability = info_of(q.device).capability
    lowest, highest = _CAPABILITIES
    is_covered = lowest <= capability <= highest and (q.dtype == torch.float16 or capability >= (8, 0))
    if dropout or not is_covered or not xformers_runs(q.device, q.dtype):
        return False
    notice("fastllm: attention runs through xformers, as torch has no flash kernel for it here", once="xformers:used")
    return True


def xformers_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, *, causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, log-sum-exp) outside autograd; the second is for `xformers_backward`, in a layout of xformers' own."""
    ops = xformers_ops()
    assert ops is not None
    out, lse = ops.memory_efficient_attention_forward_requires_grad(
        *_by_rows(q, k, v), attn_bias=_bias(causal), scale=scaling
    )
    return out.transpose(1, 2), lse


def xformers_backward(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    *,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each [B, H, S, E]."""
    ops = xformers_ops()
    assert ops is not None
    dout_rows, out_rows = _by_rows(dout, out)
    dq, dk, dv = ops.memory_efficient_attention_backward(
        dout_rows, out_rows, lse, *_by_rows(q, k, v), attn_bias=_bias(causal), scale=scaling
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _bias(causal: bool) -> Any:
    ops = xformers_ops()
    assert ops is not None
    return ops.LowerTriangularMask() if causal else None


def _by_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, H, S, E] as [B, S, H, E] with unit stride along E."""
    rows = (t.transpose(1, 2) for t in tensors)
    return [t if t.stride(-1) == 1 else t.contiguous() for t in rows]

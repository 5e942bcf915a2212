"""Attention, causal or not: picks the library kernel that serves a case best, with its backward callable on its own.

    out = dropout(softmax(cap(scaling * q k^T) + mask)) v        cap(s) = softcap * tanh(s / softcap)

The decoder layer's hand-written backward needs attention's forward and backward as two functions, so the CUDA kernels
of `torch.nn.functional.scaled_dot_product_attention` are called through their own operators; every other case (masks,
CPU, other attention functions) runs under autograd and keeps its graph in between. Documents packed into a row are
kept apart, and windows kept, without a dense mask wherever a kernel can.

Shapes: q, out [B, H, S, E]; k, v [B, K, S, E] with H a multiple of K. Key and value heads are repeated for their groups
of query heads only where a kernel has no other way: the memory-efficient one, xformers, and masks.
Source: Dao, "FlashAttention-2", arXiv 2307.08691.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._device import info_of
from .._notices import notice
from .documents import Documents
from .flash_attention import (
    flash_attention_backward,
    flash_attention_forward,
    flash_attention_is_fastest,
    flash_attention_serves,
)
from .varlen_attention import varlen_backward, varlen_forward, varlen_serves
from .xformers_attention import xformers_backward, xformers_forward, xformers_serves

aten = torch.ops.aten
AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCase:
    """What one attention call computes. `mask` is bool or additive, broadcastable to [B, H, S, S]; without one a query
    sees itself and what is before it, or everything where `causal` is False.

    Attention without a mask may be narrowed: `documents` keeps the documents of packed rows apart, `sliding_window`
    lets a query of causal attention see itself and the window - 1 keys before it (0: all). `softcap` bounds the scores
    (0: not), of any mask. `function` replaces the built-in kernels: a differentiable (q, k, v) -> out, [B, H, S, E].
    """

    scaling: float
    mask: torch.Tensor | None = None
    dropout: float = 0.0
    function: AttentionFunction | None = None
    documents: Documents | None = None
    sliding_window: int = 0
    softcap: float = 0.0
    causal: bool = True

    def __post_init__(self) -> None:
        is_free = self.mask is None and self.function is None
        if self.scaling <= 0:
            raise ValueError(f"scaling multiplies scores and must be above 0, got {self.scaling}")
        if not is_free and (self.documents is not None or self.sliding_window):
            raise ValueError("documents and sliding_window narrow attention: no mask, no function")
        if self.sliding_window and not self.causal:
            raise ValueError("sliding_window looks back from each query: it needs causal attention")
        if self.softcap and self.function is not None:
            raise ValueError("softcap bounds the scores of the built-in kernels: no function")

    @property
    def is_narrowed(self) -> bool:
        return self.documents is not None or self.sliding_window > 0 or self.softcap > 0


@dataclass(slots=True, eq=False)
class AttentionResult:
    """`out` and what the backward of `backend` needs besides q, k and v."""

    out: torch.Tensor
    backend: str
    saved: tuple[Any, ...] = ()

    @property
    def rows(self) -> torch.Tensor:
        """`out` as rows [B * S, H * E]: a view where its layout allows one."""
        batch, heads, length, head_dim = self.out.shape
        return self.out.transpose(1, 2).reshape(batch * length, heads * head_dim)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase) -> torch.Tensor:
    """Attention under autograd."""
    if case.is_narrowed:
        backend = choose_backend(q, k, v, case)
        if backend != "autograd":
            return _Attention.apply(q, k, v, case, backend)
    return _differentiable(case)(q, k, v)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase, *, dropout: float = 0.0
) -> torch.Tensor:
    """The definition; dropout only where asked for."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    wide_q, wide_k, wide_v = (
        t.to(accumulate) for t in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    )
    scores = wide_q @ wide_k.transpose(-1, -2) * case.scaling
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    mask = _dense_mask(case, q)
    if mask is None and case.causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # Not -inf: a query of left padding sees nothing, and its softmax would be NaN.
        lowest = torch.finfo(accumulate).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return (F.dropout(scores.softmax(-1), dropout) @ wide_v).to(q.dtype)


def choose_backend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase, *, allow_cudnn: bool = True
) -> str:
    """`cudnn`, `flash`, `xformers` or `efficient`: a CUDA kernel called directly; `varlen`: torch's flash kernel for
    documents and windows; `triton`: fastllm's own kernel, for what no library serves, and on Hopper, where it is
    faster than torch's flash kernels, for all that cuDNN does not; `autograd`: anything else.

    cuDNN is the fastest on Hopper and later, but compiles a plan for each new shape: `allow_cudnn=False` is for shapes
    that will not come again. A layer that recomputes its forward passes the same choice: both give the same bits.
    """
    if case.is_narrowed:
        return _choose_for_narrowed(q, k, v, case)
    direct = q.is_cuda and torch.version.hip is None and case.mask is None and case.function is None
    if not direct or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8:
        return "autograd"
    params = torch.backends.cuda.SDPAParams(q, k, v, None, case.dropout, case.causal, q.shape[1] != k.shape[1])
    deterministic = torch.are_deterministic_algorithms_enabled()
    is_hopper_or_later = info_of(q.device).capability >= (9, 0)
    if allow_cudnn and is_hopper_or_later and not deterministic and torch.backends.cuda.can_use_cudnn_attention(params):
        return "cudnn"
    if _own_kernel_is_fastest(q, k, v, case):
        return "triton"
    if not deterministic and torch.backends.cuda.can_use_flash_attention(params):
        return "flash"
    if not deterministic and xformers_serves(q, case.dropout):
        return "xformers"
    if torch.backends.cuda.can_use_efficient_attention(params) or q.shape[1] != k.shape[1]:
        return "efficient"
    return "autograd"


def _choose_for_narrowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase) -> str:
    if case.mask is None and _own_kernel_is_fastest(q, k, v, case):
        return "triton"
    if case.mask is None and not case.softcap and varlen_serves(q, k, v, case.dropout, _documents(case, q)):
        return "varlen"
    reason = "torch's flash kernel does not serve this packed, windowed or soft-capped attention here"
    if case.mask is None and flash_attention_serves(q, case.dropout):
        notice(f"fastllm: attention runs through fastllm's own Triton kernel, as {reason}", once="attention:triton")
        return "triton"
    if q.is_cuda:
        how = "document by document" if _runs_by_document(case) else "with a dense mask"
        notice(f"fastllm: attention runs {how}, as {reason}", once=f"attention:{how}")
    return "autograd"


def _own_kernel_is_fastest(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase) -> bool:
    return flash_attention_serves(q, case.dropout) and flash_attention_is_fastest(q, k, v, causal=case.causal)


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase, backend: str, *, needs_backward: bool
) -> AttentionResult:
    """Attention outside autograd. With `needs_backward` the result can be given to `attention_backward`."""
    if backend == "autograd":
        if not needs_backward:
            with torch.no_grad():
                return AttentionResult(_differentiable(case)(q, k, v), backend)
        leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad():
            out = _differentiable(case)(*leaves)
        return AttentionResult(out.detach(), backend, (out, leaves))
    if backend == "varlen":
        out, rest = varlen_forward(
            q, k, v, _documents(case, q),
            scaling=case.scaling, dropout=case.dropout, window=case.sliding_window, causal=case.causal,
        )  # fmt: skip
        return AttentionResult(out, backend, rest)
    if backend == "triton":
        out, lse = flash_attention_forward(
            q, k, v, scaling=case.scaling, documents=case.documents, window=case.sliding_window, softcap=case.softcap,
            causal=case.causal,
        )  # fmt: skip
        return AttentionResult(out, backend, (lse,))
    if backend == "cudnn":
        out, *rest = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, case.dropout, case.causal, False, scale=case.scaling
        )
        return AttentionResult(out, backend, tuple(rest))
    if backend == "flash":
        out, *rest = aten._scaled_dot_product_flash_attention(
            q, k, v, case.dropout, case.causal, False, scale=case.scaling
        )
        return AttentionResult(out, backend, tuple(rest))
    k, v = _expanded(k, q), _expanded(v, q)
    if backend == "xformers":
        out, lse = xformers_forward(q, k, v, case.scaling, causal=case.causal)
        return AttentionResult(out, backend, (lse,))
    out, *rest = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, case.dropout, case.causal, scale=case.scaling
    )
    return AttentionResult(out, backend, tuple(rest))


def attention_backward(
    result: AttentionResult, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; consumes the result."""
    saved, result.saved = result.saved, ()
    if result.backend == "autograd":
        out, leaves = saved
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        return dq, dk, dv
    if result.backend == "varlen":
        return varlen_backward(
            dout, result.out, saved, q, k, v, _documents(case, q),
            scaling=case.scaling, dropout=case.dropout, window=case.sliding_window, causal=case.causal,
        )  # fmt: skip
    if result.backend == "triton":
        (lse,) = saved
        return flash_attention_backward(
            dout, result.out, lse, q, k, v,
            scaling=case.scaling, documents=case.documents, window=case.sliding_window, softcap=case.softcap,
            causal=case.causal,
        )  # fmt: skip
    if result.backend == "xformers":
        (lse,) = saved
        dq, dk, dv = xformers_backward(
            dout, result.out, lse, q, _expanded(k, q), _expanded(v, q), case.scaling, causal=case.causal
        )
        return dq, _summed(dk, k), _summed(dv, v)
    if result.backend == "efficient":
        lse, seed, offset = saved
        wide_k, wide_v = _expanded(k, q), _expanded(v, q)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout, q, wide_k, wide_v, None, result.out, lse, seed, offset, case.dropout, [True, True, True, False],
            case.causal, scale=case.scaling,
        )  # fmt: skip
        return dq, _summed(dk, k), _summed(dv, v)
    lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
    if result.backend == "cudnn":
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, result.out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, case.dropout, case.causal,
            scale=case.scaling,
        )  # fmt: skip
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, result.out, lse, cum_q, cum_k, max_q, max_k, case.dropout, case.causal, seed, offset,
        scale=case.scaling,
    )  # fmt: skip


def _differentiable(case: AttentionCase) -> AttentionFunction:
    if case.function is not None:
        return case.function

    def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_reference(q, k, v, case, dropout=case.dropout)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if _runs_by_document(case):
            parts = zip(*(t.split(_documents(case, q).lengths, dim=2) for t in (q, k, v)), strict=True)
            whole = replace(case, documents=None)
            return torch.cat([_differentiable(whole)(*part) for part in parts], dim=2)
        mask = _dense_mask(case, q)
        if mask is not None:  # no CUDA kernel but cuDNN's takes a mask and grouped heads together
            k, v = _expanded(k, q), _expanded(v, q)
        with _sound_kernels(q, mask):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=case.dropout, is_causal=mask is None and case.causal,
                scale=case.scaling, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip

    return capped if case.softcap else sdpa


def _sound_kernels(q: torch.Tensor, mask: torch.Tensor | None) -> AbstractContextManager:
    """Context in which torch leaves cuDNN alone where there is a mask: on Hopper its backward then gives NaN at lengths
    that are an odd multiple of 64 (https://github.com/pytorch/pytorch/issues/196678)."""
    if mask is None or not q.is_cuda:
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _documents(case: AttentionCase, q: torch.Tensor) -> Documents:
    """The case's documents; without any, each row is one."""
    return case.documents or Documents.whole_rows(q.shape[0], q.shape[2], q.device)


def _runs_by_document(case: AttentionCase) -> bool:
    """Whether each document can be a call of its own. Causal rows keep the one call: their masks are shared by layers,
    and a row of text has many documents."""
    return case.documents is not None and case.documents.batch == 1 and not case.causal and not case.softcap


def _dense_mask(case: AttentionCase, q: torch.Tensor) -> torch.Tensor | None:
    if case.documents is None and not case.sliding_window:
        return case.mask
    return _documents(case, q).mask(case.sliding_window, causal=case.causal)


def _expanded(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Each key or value head repeated for the query heads that share it."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _summed(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if grad.shape[1] == x.shape[1]:
        return grad
    return grad.unflatten(1, (x.shape[1], -1)).sum(2, dtype=torch.float32).to(grad.dtype)


class _Attention(torch.autograd.Function):
    """A kernel called directly, under autograd."""

    @staticmethod
    def forward(ctx, q, k, v, case, backend):
        result = attention_forward(q, k, v, case, backend, needs_backward=any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, result.out)
        ctx.case, ctx.backend, ctx.saved = case, backend, result.saved
        return result.out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out = ctx.saved_tensors
        result = AttentionResult(out, ctx.backend, ctx.saved)
        return *attention_backward(result, dout, q, k, v, ctx.case), None, None

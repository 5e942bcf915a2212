"""Attention inside documents or within a window through torch's flash kernel for sequences of many lengths.

    out_i = sum_j softmax_j(scaling * q_i k_j) v_j        j in the document of i; causal: i - window < j <= i

Shapes: q, out [B, H, S, E]; k, v [B, K, S, E] with H a multiple of K; the kernel's own layout is [B * S, heads, E].
Dtypes: fp16 and bf16; the softmax and its statistics are fp32.
Source: Dao, "FlashAttention-2", arXiv 2307.08691.
"""

from typing import Any

import torch

from .documents import Documents

aten = torch.ops.aten
_MAX_HEAD_DIM = 256
# The backward counts elements of a padded fp32 buffer in 32 bits: heads of 32 features, documents of 128 tokens.
_MAX_ELEMENTS = 2**31
_PADDED_TOKENS, _PADDED_FEATURES = 128, 32


def varlen_serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, documents: Documents) -> bool:
    """Whether torch has its flash kernel here, and it takes these heads. Its backward is not deterministic."""
    if not q.is_cuda or torch.version.hip is not None or torch.are_deterministic_algorithms_enabled():
        return False
    batch, heads, length, width = q.shape
    if q.dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > _MAX_HEAD_DIM:
        return False
    padded_tokens = batch * length + _PADDED_TOKENS * documents.cu_seqlens.numel()
    if padded_tokens * heads * -(-width // _PADDED_FEATURES) * _PADDED_FEATURES >= _MAX_ELEMENTS:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, dropout, True, heads != k.shape[1])
    return torch.backends.cuda.can_use_flash_attention(params)


def varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int = 0,
    causal: bool = True,
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """(out, what the backward needs besides) outside autograd."""
    offsets, longest = documents.cu_seqlens, documents.max_seqlen
    out, lse, rng_state, unused, _ = aten._flash_attention_forward(
        *_by_token(q, k, v), offsets, offsets, longest, longest, dropout, causal, False, scale=scaling,
        window_size_left=_left(window), window_size_right=0 if causal else -1,
    )  # fmt: skip
    return _by_head(out, q), (lse, rng_state, unused)


def varlen_backward(
    dout: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[Any, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int = 0,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each in its shape."""
    lse, rng_state, unused = saved
    offsets, longest = documents.cu_seqlens, documents.max_seqlen
    dout_rows, q_rows, k_rows, v_rows, out_rows = _by_token(dout, q, k, v, out)
    dq, dk, dv = aten._flash_attention_backward(
        dout_rows, q_rows, k_rows, v_rows, out_rows, lse, offsets, offsets, longest, longest, dropout, causal,
        rng_state, unused, scale=scaling, window_size_left=_left(window), window_size_right=0 if causal else -1,
    )  # fmt: skip
    return _by_head(dq, q), _by_head(dk, k), _by_head(dv, v)


def _left(window: int) -> int:
    """How many keys before its own a query sees; -1 is all."""
    return window - 1


def _by_token(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, H, S, E] as [B * S, H, E] with unit stride along E, views where the strides allow."""
    tokens = (t.transpose(1, 2).flatten(0, 1) for t in tensors)
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tokens]


def _by_head(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tokens.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)

"""Rotary position embedding of queries and keys, in one launch.

    y1 = x1 * cos1 - x2 * sin1,   y2 = x2 * cos2 + x1 * sin2

where x1, x2 are the halves of the first `rotary_dim` features of each head and cos1, cos2 the halves of `cos`; features
past `rotary_dim` (partial rotary: Phi, GLM) pass unchanged. Scaled variants (Llama 3, YaRN, LongRoPE, linear) differ in
the angles only, which the caller computes.

Shapes: q [B, H, S, E], k [B, K, S, E], any strides with unit stride along E; cos, sin [B or 1, S, rotary_dim].
Dtypes: q, k in any float dtype, cos and sin in any; the arithmetic is fp32 and rounds once.
Source: Su et al., "RoFormer", arXiv 2104.09864, equation 34, in the half-split layout of Hugging Face.
"""

import torch

from .dispatch import jit, launch_on, next_power_of_2, num_warps_for, tl, use_triton

_HEADS_PER_PROGRAM = 16


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated copies of q and k, with gradients for both. The angles get none."""
    if use_triton(q):
        return _Rope.apply(q, k, cos, sin)
    return rope_reference(q, cos, sin), rope_reference(k, cos, sin)


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """One tensor `x [B, H, S, E]` rotated; `inverse` applies the transposed rotation, which is the backward."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1] // 2
    cos, sin = (t.to(accumulate).unsqueeze(1) for t in (cos, sin))
    x1, x2, rest = (part.to(accumulate) for part in x.split([half, half, x.shape[-1] - 2 * half], dim=-1))
    (cos1, cos2), (sin1, sin2) = (t.split(half, dim=-1) for t in (cos, sin))
    if inverse:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    return torch.cat((y1, y2, rest), dim=-1).to(x.dtype)


def rope_apply(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    *,
    inverse: bool = False,
) -> None:
    """Write the rotation of q and k into `q_out` and `k_out`, which may be q and k themselves (in place).

    On the Triton path a tensor without unit stride along its last dimension raises a ValueError.
    """
    if not use_triton(q):
        q_out.copy_(rope_reference(q, cos, sin, inverse=inverse))
        k_out.copy_(rope_reference(k, cos, sin, inverse=inverse))
        return
    batch, q_heads, length, head_dim = q.shape
    if batch * length == 0:
        return
    k_heads, half = k.shape[1], cos.shape[-1] // 2
    if min(t.stride(-1) for t in (q, k, cos, sin, q_out, k_out)) != 1:
        raise ValueError("rope_apply needs unit stride along the last dimension of every tensor")
    heads_block = min(next_power_of_2(q_heads + k_heads), _HEADS_PER_PROGRAM)
    with launch_on(q):
        _rope_kernel[(batch * length, -(-(q_heads + k_heads) // heads_block))](
            q, k, q_out, k_out, cos, sin, length, q_heads, k_heads, head_dim, half,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), sin.stride(0) if sin.shape[0] > 1 else 0,
            sin.stride(1), INVERSE=inverse, HEADS=heads_block, HALF=next_power_of_2(half),
            TAIL=next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0,
            num_warps=num_warps_for(heads_block * next_power_of_2(half) * 2),
        )  # fmt: skip


@jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, length, q_heads, k_heads, head_dim, half,
    q_b, q_h, q_s, k_b, k_h, k_s, qo_b, qo_h, qo_s, ko_b, ko_h, ko_s, cos_b, cos_s, sin_b, sin_s,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // length, token % length
    i = tl.arange(0, HALF)
    i_live = i < half
    cos_row, sin_row = cos_ptr + b * cos_b + s * cos_s, sin_ptr + b * sin_b + s * sin_s
    cos1 = tl.load(cos_row + i, mask=i_live, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_row + half + i, mask=i_live, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_row + i, mask=i_live, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_row + half + i, mask=i_live, other=0.0).to(tl.float32)[None, :]

    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q = heads < q_heads
    is_k = (heads >= q_heads) & (heads < q_heads + k_heads)
    h = heads.to(tl.int64)
    q_at = (q_ptr + b * q_b + s * q_s + h * q_h)[:, None]
    k_at = (k_ptr + b * k_b + s * k_s + (h - q_heads) * k_h)[:, None]
    q_to = (q_out_ptr + b * qo_b + s * qo_s + h * qo_h)[:, None]
    k_to = (k_out_ptr + b * ko_b + s * ko_s + (h - q_heads) * ko_h)[:, None]
    q_live, k_live = is_q[:, None] & i_live[None, :], is_k[:, None] & i_live[None, :]

    first, second = i[None, :], half + i[None, :]
    x1 = tl.load(q_at + first, mask=q_live, other=0.0).to(tl.float32)
    x2 = tl.load(q_at + second, mask=q_live, other=0.0).to(tl.float32)
    x1 += tl.load(k_at + first, mask=k_live, other=0.0).to(tl.float32)
    x2 += tl.load(k_at + second, mask=k_live, other=0.0).to(tl.float32)
    if INVERSE:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    tl.store(q_to + first, y1.to(q_out_ptr.dtype.element_ty), mask=q_live)
    tl.store(q_to + second, y2.to(q_out_ptr.dtype.element_ty), mask=q_live)
    tl.store(k_to + first, y1.to(k_out_ptr.dtype.element_ty), mask=k_live)
    tl.store(k_to + second, y2.to(k_out_ptr.dtype.element_ty), mask=k_live)
    if TAIL > 0:
        j = 2 * half + tl.arange(0, TAIL)[None, :]
        q_tail, k_tail = is_q[:, None] & (j < head_dim), is_k[:, None] & (j < head_dim)
        tl.store(q_to + j, tl.load(q_at + j, mask=q_tail, other=0.0), mask=q_tail)
        tl.store(k_to + j, tl.load(k_at + j, mask=k_tail, other=0.0), mask=k_tail)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        rope_apply(q, k, cos, sin, q_out, k_out)
        ctx.save_for_backward(cos, sin)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        dq, dk = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq, dk))
        q_grad, k_grad = torch.empty_like(dq), torch.empty_like(dk)
        rope_apply(dq, dk, cos, sin, q_grad, k_grad, inverse=True)
        return q_grad, k_grad, None, None

"""Rotary embedding of queries and keys."""

import functools

import pytest
import torch

from fastllm.kernels.rope import rope, rope_apply, rope_reference

from . import eager
from .parity import Limit, Setting, check_op

LIMIT = Limit(1.1, 6e-8)
LIMITS = {"y": LIMIT, "y1": LIMIT, "dq": LIMIT, "dk": LIMIT}
# (batch, query heads, key heads, length, head dim, rotary dim)
SHAPES = {
    "one_token": (1, 1, 1, 1, 8, 8),
    "grouped": (2, 8, 2, 5, 16, 16),
    "odd_heads": (1, 7, 3, 11, 20, 20),
    "partial_rotary": (2, 4, 1, 3, 80, 32),
    "wide_head": (1, 3, 1, 2, 256, 256),
    "many_heads": (1, 70, 3, 2, 128, 128),
    "odd_tail": (1, 2, 1, 3, 13, 6),
}


def angles(setting: Setting, length: int, rotary_dim: int, *, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [batch, S, rotary_dim] in fp32. The two halves differ, as YaRN's or M-RoPE's sections may."""
    frequencies = 10_000.0 ** (-torch.arange(rotary_dim) / rotary_dim)
    positions = torch.arange(length)[None, :, None] + 17 * torch.arange(batch)[:, None, None]
    phases = (positions * frequencies).to(setting.device)
    return phases.cos() * 1.2, phases.sin() * 1.2


def check_rope(setting: Setting, shape: str, *, batch_of_angles: int = 1) -> None:
    batch, q_heads, k_heads, length, head_dim, rotary_dim = SHAPES[shape]
    cos, sin = (t.to(setting.dtype) for t in angles(setting, length, rotary_dim, batch=batch_of_angles))
    inputs = {
        "q": setting.randn(batch, q_heads, length, head_dim),
        "k": setting.randn(batch, k_heads, length, head_dim),
    }
    upstream = tuple(setting.randn(*t.shape) for t in inputs.values())

    def plain(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return eager.rope(q, k, cos, sin)

    check_op(functools.partial(rope, cos=cos, sin=sin), plain, setting, inputs, LIMITS, upstream=upstream)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(setting, shape):
    check_rope(setting, shape)


def test_angles_per_row_of_the_batch(setting):
    """Left-padded or packed batches have other positions in each row."""
    check_rope(setting, "grouped", batch_of_angles=2)


def test_fp32_angles(setting):
    """Angles of more precision than q are used as they are."""
    cos, sin = angles(setting, 5, 16)
    inputs = {"q": setting.randn(2, 4, 5, 16), "k": setting.randn(2, 2, 5, 16)}
    upstream = tuple(setting.randn(*t.shape) for t in inputs.values())

    def plain(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            out.to(q.dtype) for out in eager.rope(q.to(torch.promote_types(q.dtype, torch.float32)), k, cos, sin)
        )

    check_op(functools.partial(rope, cos=cos, sin=sin), plain, setting, inputs, LIMITS, upstream=upstream)


@pytest.mark.parametrize("layout", ["joined_projection", "transposed_features", "expanded_upstream"])
def test_layouts(setting, layout):
    """q and k as columns of one joined projection output; features that are not the innermost dimension."""
    batch, length, q_heads, k_heads, head_dim = 2, 5, 4, 2, 16
    cos, sin = (t.to(setting.dtype) for t in angles(setting, length, head_dim))
    joined = setting.randn(batch, length, q_heads + 2 * k_heads, head_dim).transpose(1, 2)
    q, k = joined[:, :q_heads], joined[:, q_heads : q_heads + k_heads]
    upstream = setting.randn(*q.shape), setting.randn(*k.shape)
    if layout == "transposed_features":
        q, k = (setting.randn(*t.shape[:2], head_dim, length).transpose(2, 3) for t in (q, k))
        upstream = upstream[0].transpose(2, 3).contiguous().transpose(2, 3), upstream[1]
    elif layout == "expanded_upstream":
        upstream = torch.ones((), dtype=setting.dtype, device=q.device).expand(q.shape), upstream[1]

    def plain(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return eager.rope(q, k, cos, sin)

    op = functools.partial(rope, cos=cos, sin=sin)
    check_op(op, plain, setting, {"q": q, "k": k}, LIMITS, upstream=upstream)


def check_in_place(setting: Setting) -> None:
    """In place, inside a joined buffer, gives the bits of out of place, leaves v alone, and the inverse undoes it."""
    joined = setting.randn(1, 6, 3 + 2 + 2, 20).transpose(1, 2)
    before = joined.clone()
    cos, sin = (t.to(setting.dtype) for t in angles(setting, 6, 12))
    q, k = joined[:, :3], joined[:, 3:5]
    with setting.active():
        expected = rope(q, k, cos, sin)
        rope_apply(q, k, cos, sin, q, k)
        assert q.equal(expected[0]) and k.equal(expected[1]) and joined[:, 5:].equal(before[:, 5:])
        assert joined[..., 12:].equal(before[..., 12:]), "features past the rotary dimension moved"


def test_in_place(setting):
    check_in_place(setting)


def test_inverse_undoes_the_rotation(fp32):
    """With equal halves of the angles (a true rotation) the transpose is the inverse."""
    phases = torch.rand(1, 5, 8, generator=fp32.generator).to(fp32.device)
    cos, sin = (torch.cat((t, t), -1) for t in (phases.cos(), phases.sin()))
    q, k = fp32.randn(2, 3, 5, 16), fp32.randn(2, 1, 5, 16)
    turned = [torch.empty_like(t) for t in (q, k)]
    with fp32.active():
        rope_apply(q, k, cos, sin, *turned)
        rope_apply(*turned, cos, sin, *turned, inverse=True)
    for back, start in zip(turned, (q, k), strict=True):
        assert (back - start).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(0, 4, 5, 16), (2, 4, 0, 16)], ids=["no_batch", "no_tokens"])
def test_empty(setting, shape):
    q, k = setting.randn(*shape).requires_grad_(), setting.randn(shape[0], 1, *shape[2:])
    cos, sin = angles(setting, shape[2], 16)
    with setting.active():
        q_out, k_out = rope(q, k, cos, sin)
        q_out.sum().backward()
    assert q_out.shape == q.shape and k_out.shape == k.shape and q.grad is not None


def test_only_requested_gradients(fp32):
    cos, sin = angles(fp32, 5, 16)
    q, k = fp32.randn(1, 2, 5, 16).requires_grad_(), fp32.randn(1, 2, 5, 16)
    with fp32.active():
        q_out, k_out = rope(q, k, cos.requires_grad_(), sin)
        (q_out.sum() + k_out.sum()).backward()
    assert q.grad is not None and k.grad is None and sin.grad is None


def test_gradcheck():
    q, k = (torch.randn(1, heads, 3, 10, dtype=torch.float64, requires_grad=True) for heads in (3, 2))
    cos, sin = (torch.randn(1, 3, 6, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: rope(a, b, cos, sin), (q, k))
    inverse = functools.partial(rope_reference, cos=cos, sin=sin, inverse=True)
    (by_autograd,) = torch.autograd.grad(rope(q, k, cos, sin)[0], q, k[:, [0, 1, 0]])
    torch.testing.assert_close(by_autograd, inverse(k[:, [0, 1, 0]]))

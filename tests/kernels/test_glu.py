"""Gated linear units: SwiGLU and the two GEGLUs."""

import functools

import pytest
import torch

from fastllm.kernels.activation import ACTIVATIONS
from fastllm.kernels.glu import glu, glu_backward, glu_forward

from . import eager
from .parity import Limit, OverLimit, Setting, assert_parity, check_op, run

LIMIT = Limit(1.1, 1e-7)
LIMITS = {"y": LIMIT, "dgate": LIMIT, "dup": LIMIT}
# torch's own GELU, which is the reference, makes 1.1e-7 on a CPU in fp32; ours 0.8e-7.
TORCH_GELU_LIMITS = {**LIMITS, "dgate": Limit(1.1, 1.3e-7)}


def limits_for(setting: Setting, activation: str) -> dict[str, Limit]:
    return TORCH_GELU_LIMITS if setting.implementation == "reference" and activation == "gelu" else LIMITS


def check_glu(setting: Setting, *shape: int, activation: str = "silu") -> None:
    inputs = {"gate": setting.randn(*shape), "up": setting.randn(*shape)}
    op, plain = (functools.partial(f, activation=activation) for f in (glu, eager.glu))
    check_op(op, plain, setting, inputs, limits_for(setting, activation), upstream=(setting.randn(*shape),))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 61), (3, 5, 97), (2, 1025), (5, 2048)], ids=str)
def test_matches_float64(setting, shape, activation):
    check_glu(setting, *shape, activation=activation)


@pytest.mark.parametrize("layout", ["halves", "transposed", "broadcast"])
def test_layouts(setting, layout):
    gate, up = {
        "halves": lambda: setting.randn(5, 200).chunk(2, dim=-1),
        "transposed": lambda: (setting.randn(100, 5).t(), setting.randn(100, 5).t()),
        "broadcast": lambda: (setting.randn(1, 100).expand(5, 100), setting.randn(5, 1).expand(5, 100)),
    }[layout]()
    upstream = torch.ones((), dtype=setting.dtype, device=setting.device).expand(5, 100)
    op, plain = (functools.partial(f, activation="silu") for f in (glu, eager.glu))
    check_op(op, plain, setting, {"gate": gate, "up": up}, LIMITS, upstream=(upstream,))


def check_overlay(setting: Setting, activation: str = "silu") -> None:
    """The decoder layer's use: gradients over gate and up inside a wider buffer, h over its own gradient."""
    rows, width = 7, 1030
    wide = setting.randn(rows, 2 * width + 6)
    spare = wide[:, 2 * width :].clone()
    gate, up = wide[:, :width], wide[:, width : 2 * width]
    dh = setting.randn(rows, width)
    inputs, upstream = {"gate": gate.clone(), "up": up.clone()}, dh.clone()
    with setting.active():
        h = glu_forward(gate, up, activation, out=torch.empty_like(dh))
        glu_backward(dh, gate, up, activation, gate, up, h_out=dh)
    assert wide[:, 2 * width :].equal(spare), "wrote past the columns of up"
    if not dh.equal(h):
        raise OverLimit("the backward's h differs from the forward's")
    plain = functools.partial(eager.glu, activation=activation)
    theirs = run(plain, inputs, (upstream,))
    truth = run(plain, {name: t.double() for name, t in inputs.items()}, (upstream.double(),))
    for name, value in {"y": h, "dgate": gate, "dup": up}.items():
        assert_parity(name, value, theirs[name], truth[name], limits_for(setting, activation)[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_overlay(setting, activation):
    check_overlay(setting, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values(setting, activation):
    """Both tails, where naive exponentials overflow: act(x) is x on the right and 0 on the left, slopes 1 and 0."""
    gate = torch.tensor([[-6e4, -100.0, 100.0, 6e4]], dtype=setting.dtype, device=setting.device).requires_grad_()
    up = torch.ones_like(gate)
    with setting.active():
        h = glu(gate, up, activation)
        h.sum().backward()
    assert h.equal(gate.detach().clamp(min=0)) and gate.grad is not None
    assert gate.grad.equal((gate > 0).to(setting.dtype))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_rows(setting, shape):
    gate, up = setting.randn(*shape).requires_grad_(), setting.randn(*shape).requires_grad_()
    with setting.active():
        glu(gate, up).sum().backward()
    assert gate.grad is not None and gate.grad.shape == shape and up.grad is not None


def test_only_requested_gradients(fp32):
    gate, up = fp32.randn(3, 9).requires_grad_(), fp32.randn(3, 9)
    with fp32.active():
        glu(gate, up).sum().backward()
    assert gate.grad is not None and up.grad is None


def test_unknown_activation(fp32):
    with fp32.active(), pytest.raises(ValueError, match="relu"):
        glu(fp32.randn(2, 4), fp32.randn(2, 4), "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(functools.partial(glu, activation=activation), (gate, up))

"""Element-wise activations: SiLU and the three GELUs."""

import functools

import pytest
import torch

from fastllm.kernels.activation import ACTIVATIONS, activation, activation_backward, activation_forward

from . import eager
from .parity import Limit, OverLimit, Setting, assert_parity, check_op, run

# torch's own GELU, which is the reference, makes 1.1e-7 on a CPU in fp32.
LIMIT = Limit(1.1, 1.3e-7)
LIMITS = {"y": LIMIT, "dx": LIMIT}


def check_activation(setting: Setting, *shape: int, name: str) -> None:
    op, plain = (functools.partial(f, name=name) for f in (activation, eager.activated))
    check_op(op, plain, setting, {"x": setting.randn(*shape)}, LIMITS, upstream=(setting.randn(*shape),))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 61), (3, 5, 97), (2, 1025), (5, 2048)], ids=str)
def test_matches_float64(setting, shape, name):
    check_activation(setting, *shape, name=name)


@pytest.mark.parametrize("layout", ["columns", "transposed", "broadcast"])
def test_layouts(setting, layout):
    x = {
        "columns": lambda: setting.randn(5, 200)[:, 50:150],
        "transposed": lambda: setting.randn(100, 5).t(),
        "broadcast": lambda: setting.randn(1, 100).expand(5, 100),
    }[layout]()
    upstream = torch.ones((), dtype=setting.dtype, device=setting.device).expand(5, 100)
    op, plain = (functools.partial(f, name="quick_gelu") for f in (activation, eager.activated))
    check_op(op, plain, setting, {"x": x}, LIMITS, upstream=(upstream,))


def check_overlay(setting: Setting, name: str) -> None:
    """The vision block's use: the gradient over x inside a wider buffer, y over its own gradient."""
    rows, width = 7, 1030
    buffer = setting.randn(rows, width + 6)
    spare, x, dy = buffer[:, width:].clone(), buffer[:, :width], setting.randn(rows, width)
    inputs, upstream = {"x": x.clone()}, dy.clone()
    with setting.active():
        y = activation_forward(x, name, out=torch.empty_like(dy))
        activation_backward(dy, x, name, x, y_out=dy)
    assert buffer[:, width:].equal(spare), "wrote past the columns of x"
    if not dy.equal(y):
        raise OverLimit("the backward's y differs from the forward's")
    plain = functools.partial(eager.activated, name=name)
    theirs, truth = run(plain, inputs, (upstream,)), run(plain, {"x": inputs["x"].double()}, (upstream.double(),))
    for output, value in {"y": y, "dx": x}.items():
        assert_parity(output, value, theirs[output], truth[output], LIMIT)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_overlay(setting, name):
    check_overlay(setting, name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_values(setting, name):
    """Both tails, where naive exponentials overflow: act(x) is x on the right and 0 on the left, slopes 1 and 0."""
    x = torch.tensor([[-6e4, -100.0, 100.0, 6e4]], dtype=setting.dtype, device=setting.device).requires_grad_()
    with setting.active():
        y = activation(x, name)
        y.sum().backward()
    assert y.equal(x.detach().clamp(min=0)) and x.grad is not None and x.grad.equal((x > 0).to(setting.dtype))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_rows(setting, shape):
    x = setting.randn(*shape).requires_grad_()
    with setting.active():
        activation(x, "gelu").sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def test_unknown_activation(fp32):
    with fp32.active(), pytest.raises(ValueError, match="relu"):
        activation(fp32.randn(2, 4), "relu")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck(name):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: activation(x, name), (x,))

"""LayerNorm, alone and after a residual addition."""

import functools

import pytest
import torch

from fastllm.kernels.layer_norm import layer_norm, layer_norm_backward, layer_norm_forward, layer_norm_reference

from . import eager
from .parity import Limit, OverLimit, Setting, assert_parity, check_op

# Rows of one or of few elements nearly cancel in dx: there the floor is that of the terms.
LIMITS = {
    "y": Limit(1.1, 2e-7), "dx": Limit(1.1, 3e-7), "dweight": Limit(1.1, 3e-7), "dbias": Limit(1.1, 2.5e-7),
}  # fmt: skip
EPS = 1e-6
OP, PLAIN = (functools.partial(function, eps=EPS) for function in (layer_norm, eager.layer_norm))


def uneven_rows(setting: Setting, *shape: int) -> torch.Tensor:
    """Rows of sizes 1, 0.03 and 0.002 away from zero: eps matters in the last ones, the mean in all."""
    sizes = torch.tensor([1.0, 0.03, 0.002]).repeat(-(-shape[-2] // 3))[: shape[-2], None]
    return setting.randn(*shape).add_(0.5).mul_(sizes.to(setting.device))


def check_layer_norm(setting: Setting, *shape: int) -> None:
    inputs = {
        "x": uneven_rows(setting, *shape), "weight": setting.randn(shape[-1]) + 1, "bias": setting.randn(shape[-1]),
    }  # fmt: skip
    check_op(OP, PLAIN, setting, inputs, LIMITS, upstream=(setting.randn(*shape),))


@pytest.mark.parametrize("shape", [(2, 8), (1, 1, 31), (3, 7, 100), (2, 33, 257), (5, 2049), (17, 128)], ids=str)
def test_matches_float64(setting, shape):
    check_layer_norm(setting, *shape)


def test_more_rows_than_programs(fp32):
    """Beyond 512 programs each one walks over several groups of rows and sums their share of dw and db."""
    check_layer_norm(fp32, 515, 2049)


@pytest.mark.parametrize("layout", ["columns", "every_second_row", "transposed", "broadcast"])
def test_layouts(setting, layout):
    """Inputs that are views: columns of a wider buffer, strided rows, a transposed matrix, one row repeated."""
    x = {
        "columns": lambda: setting.randn(7, 300)[:, 50:150],
        "every_second_row": lambda: setting.randn(14, 100)[::2],
        "transposed": lambda: setting.randn(100, 7).t(),
        "broadcast": lambda: setting.randn(1, 100).expand(7, 100),
    }[layout]()
    inputs = {"x": x, "weight": setting.randn(200)[::2], "bias": setting.randn(200)[::2]}
    check_op(OP, PLAIN, setting, inputs, LIMITS, upstream=(setting.randn(100, 7).t(),))


def test_upstream_gradient_of_a_sum(fp32):
    """`y.sum()` sends one number to every element, with stride 0."""
    inputs = {"x": fp32.randn(5, 33), "weight": fp32.randn(33), "bias": fp32.randn(33)}
    check_op(OP, PLAIN, fp32, inputs, LIMITS, upstream=(torch.ones((), device=fp32.device).expand(5, 33),))


def test_parameters_of_another_dtype(setting):
    """fp32 parameters under 16-bit activations: y keeps x's dtype, dw and db theirs."""
    weight, bias = (setting.randn(65, dtype=torch.float32) for _ in range(2))
    inputs = {"x": setting.randn(9, 65), "weight": weight, "bias": bias}
    check_op(OP, PLAIN, setting, inputs, LIMITS, upstream=(setting.randn(9, 65),), computed_in=setting.dtype)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_rows(setting, shape):
    leaves = [t.requires_grad_() for t in (setting.randn(*shape), setting.randn(16), setting.randn(16))]
    with setting.active():
        y = layer_norm(*leaves, EPS)
        y.sum().backward()
    assert y.shape == shape and all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_requested_gradients(fp32, wanted):
    given = [fp32.randn(4, 24), fp32.randn(24), fp32.randn(24)]
    with fp32.active():
        assert not layer_norm(*given, EPS).requires_grad
        given[wanted].requires_grad_()
        layer_norm(*given, EPS).sum().backward()
    assert [t.grad is not None for t in given] == [index == wanted for index in range(3)]


def test_a_large_mean_cancels_nothing(setting):
    """Rows 1000 standard deviations away from zero keep every digit that their dtype holds of them."""
    x = (setting.randn(6, 257, dtype=torch.float32) + 1000).to(setting.dtype)
    weight, bias = torch.ones(257, device=x.device), torch.zeros(257, device=x.device)
    y = torch.empty(6, 257, device=x.device)
    with setting.active():
        layer_norm_forward(x, weight, bias, EPS, out=y)
    truth = eager.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    # The mean itself is rounded to fp32.
    assert (y - truth).abs().max() < 1000 * 2.0**-23 / x.double().std()


def check_add_and_norm(setting: Setting, rows: int, width: int) -> None:
    """y = norm(x + residual) into the left part of a wider buffer, and its backward with a second branch's gradient."""
    x, residual = uneven_rows(setting, rows, width), setting.randn(rows, width)
    weight, bias = setting.randn(width) + 1, setting.randn(width)
    dy, branch = setting.randn(rows, width), setting.randn(rows, width)
    y, dx = (torch.full((rows, width + 5), 7.0, device=x.device, dtype=x.dtype) for _ in range(2))
    with setting.active():
        _, total, mean, rstd = layer_norm_forward(x, weight, bias, EPS, residual=residual, out=y[:, :width])
        _, dw, db = layer_norm_backward(
            dy, total, weight, mean, rstd, EPS, residual_grad=branch, out=dx[:, :width], needs_parameter_grads=True
        )
    if not total.equal(x + residual):
        raise OverLimit("the sum is not x + residual")
    assert dw is not None and db is not None
    assert (y[:, width:] == 7).all() and (dx[:, width:] == 7).all(), "wrote past the columns of out"

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (total, weight, bias)]
        out = eager.layer_norm(*leaves, EPS)
        grad_x, *grads = torch.autograd.grad(out, leaves, dy.to(dtype))
        return [out.detach(), grad_x + branch.to(dtype), *grads]

    found = (y[:, :width], dx[:, :width], dw, db)
    for name, value, yardstick, right in zip(LIMITS, found, plain(x.dtype), plain(torch.float64), strict=True):
        assert_parity(name, value, yardstick, right, LIMITS[name])
    exact = total.double()
    rstd_truth = torch.rsqrt(exact.var(-1, correction=0) + EPS)
    assert_parity("rstd", rstd, rstd_truth.float(), rstd_truth, LIMITS["y"])
    assert (mean - exact.mean(-1)).abs().max() <= 2e-7 * exact.abs().max()


@pytest.mark.parametrize("shape", [(1, 8), (7, 100), (33, 257)], ids=str)
def test_add_and_norm(setting, shape):
    check_add_and_norm(setting, *shape)


def test_gradcheck():
    inputs = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 10), (10,), (10,)))
    for function in (layer_norm, layer_norm_reference):
        assert torch.autograd.gradcheck(lambda *given, f=function: f(*given, 1e-3), inputs)

"""RMSNorm, alone and after a residual addition."""

import functools

import pytest
import torch

from fastllm.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward, rms_norm_reference

from . import eager
from .parity import Limit, OverLimit, Setting, assert_parity, check_op

LIMITS = {"y": Limit(1.1, 1.5e-7), "dx": Limit(1.1, 1.5e-7), "dweight": Limit(1.1, 2.5e-7)}
EPS = 1e-5


def uneven_rows(setting: Setting, *shape: int) -> torch.Tensor:
    """Rows of sizes 1, 0.05 and 0.005: eps matters in the last ones."""
    sizes = torch.tensor([1.0, 0.05, 0.005]).repeat(-(-shape[-2] // 3))[: shape[-2], None]
    return setting.randn(*shape).mul_(sizes.to(setting.device))


def check_rms_norm(setting: Setting, *shape: int, offset: float = 0.0) -> None:
    inputs = {"x": uneven_rows(setting, *shape), "weight": setting.randn(shape[-1]) + 1}
    check_op(
        functools.partial(rms_norm, eps=EPS, offset=offset),
        functools.partial(eager.rms_norm, eps=EPS, offset=offset),
        setting, inputs, LIMITS, upstream=(setting.randn(*shape),),
    )  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(1, 8), (1, 1, 31), (3, 7, 100), (2, 33, 257), (5, 2049), (17, 128)], ids=str)
def test_matches_float64(setting, shape, offset):
    check_rms_norm(setting, *shape, offset=offset)


def test_more_rows_than_programs(fp32):
    """Beyond 512 programs each one walks over several groups of rows and sums their share of dw."""
    check_rms_norm(fp32, 515, 2049)


@pytest.mark.parametrize("layout", ["columns", "every_second_row", "transposed", "broadcast"])
def test_layouts(setting, layout):
    """Inputs that are views: columns of a wider buffer, strided rows, a transposed matrix, one row repeated."""
    x = {
        "columns": lambda: setting.randn(7, 300)[:, 50:150],
        "every_second_row": lambda: setting.randn(14, 100)[::2],
        "transposed": lambda: setting.randn(100, 7).t(),
        "broadcast": lambda: setting.randn(1, 100).expand(7, 100),
    }[layout]()
    upstream = setting.randn(100, 7).t()
    inputs = {"x": x, "weight": setting.randn(200)[::2]}
    op, plain = (functools.partial(f, eps=EPS) for f in (rms_norm, eager.rms_norm))
    check_op(op, plain, setting, inputs, LIMITS, upstream=(upstream,))


def test_upstream_gradient_of_a_sum(fp32):
    """`y.sum()` sends one number to every element, with stride 0."""
    inputs = {"x": fp32.randn(5, 33), "weight": fp32.randn(33)}
    op, plain = (functools.partial(f, eps=EPS) for f in (rms_norm, eager.rms_norm))
    check_op(op, plain, fp32, inputs, LIMITS, upstream=(torch.ones((), device=fp32.device).expand(5, 33),))


def test_weight_of_another_dtype(setting):
    """fp32 norm weights under 16-bit activations: y keeps x's dtype, dw the weight's."""
    inputs = {"x": setting.randn(9, 65), "weight": setting.randn(65, dtype=torch.float32)}
    op, plain = (functools.partial(f, eps=EPS) for f in (rms_norm, eager.rms_norm))
    check_op(
        op, plain, setting, inputs, LIMITS, upstream=(setting.randn(9, 65),), computed_in=setting.dtype
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_rows(setting, shape):
    x, weight = setting.randn(*shape).requires_grad_(), setting.randn(16).requires_grad_()
    with setting.active():
        y = rms_norm(x, weight, EPS)
        y.sum().backward()
    assert y.shape == shape and x.grad is not None and x.grad.shape == shape
    assert weight.grad is not None and not weight.grad.any()


def test_only_requested_gradients(fp32):
    x, weight = fp32.randn(4, 24), fp32.randn(24)
    with fp32.active():
        rms_norm(x.requires_grad_(), weight, EPS).sum().backward()
        assert x.grad is not None and weight.grad is None
        rms_norm(x.detach(), weight.requires_grad_(), EPS).sum().backward()
        assert weight.grad is not None
        assert not rms_norm(x.detach(), weight.detach(), EPS).requires_grad


def test_large_and_broken_values(setting):
    """Squares that overflow 16 bits are no matter, and NaN stays in its row."""
    x = setting.randn(3, 100, scale=1.0)
    x[0] *= 6e4 / x[0].abs().max()
    x[1, 7] = float("nan")
    with setting.active():
        y = rms_norm(x, torch.ones(100, device=x.device, dtype=x.dtype), EPS)
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isfinite().all()
    assert y[0].float().square().mean().sub(1).abs() < 0.01


def check_add_and_norm(setting: Setting, rows: int, width: int, *, offset: float = 0.0) -> None:
    """y = norm(x + residual) into the left part of a wider buffer, and its backward with a second branch's gradient."""
    x, residual, weight = uneven_rows(setting, rows, width), setting.randn(rows, width), setting.randn(width) + 1
    dy, branch = setting.randn(rows, width), setting.randn(rows, width)
    y, dx = (torch.full((rows, width + 5), 7.0, device=x.device, dtype=x.dtype) for _ in range(2))
    with setting.active():
        _, total, rstd = rms_norm_forward(
            x, weight, EPS, offset=offset, residual=residual, out=y[:, :width]
        )  # fmt: skip
        _, dw = rms_norm_backward(
            dy, total, weight, rstd, EPS, offset=offset, residual_grad=branch, out=dx[:, :width],
            needs_weight_grad=True,
        )  # fmt: skip
    if not total.equal(x + residual):
        raise OverLimit("the sum is not x + residual")
    assert dw is not None
    assert (y[:, width:] == 7).all() and (dx[:, width:] == 7).all(), "wrote past the columns of out"

    def plain(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, branch: torch.Tensor) -> list[torch.Tensor]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = eager.rms_norm(x, weight, EPS, offset=offset)
        grad_x, grad_weight = torch.autograd.grad(out, (x, weight), dy)
        return [out.detach(), grad_x + branch, grad_weight]

    theirs = plain(total, weight, dy, branch)
    truth = plain(*(t.double() for t in (total, weight, dy, branch)))
    rstd_eager, rstd_truth = (torch.rsqrt(t.square().mean(-1) + EPS) for t in (total.float(), total.double()))
    assert_parity("rstd", rstd, rstd_eager, rstd_truth, LIMITS["y"])
    for name, value, yardstick, right in zip(LIMITS, (y[:, :width], dx[:, :width], dw), theirs, truth, strict=True):
        assert_parity(name, value, yardstick, right, LIMITS[name])


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(1, 8), (7, 100), (33, 257)], ids=str)
def test_add_and_norm(setting, shape, offset):
    check_add_and_norm(setting, *shape, offset=offset)


def test_output_dtype_follows_out(setting):
    """An fp32 residual stream normalised straight into the compute dtype, with one rounding."""
    x, weight = setting.randn(5, 40, dtype=torch.float32), setting.randn(40, dtype=torch.float32)
    y = torch.empty(5, 40, device=x.device, dtype=setting.dtype)
    with setting.active():
        rms_norm_forward(x, weight, EPS, out=y)
    plain, truth = eager.rms_norm(x, weight, EPS), eager.rms_norm(x.double(), weight.double(), EPS)
    assert_parity("y", y, plain.to(setting.dtype), truth, LIMITS["y"])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck(offset):
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 10), (10,)))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm_reference(a, b, 1e-3, offset=offset), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3, offset=offset), (x, weight))

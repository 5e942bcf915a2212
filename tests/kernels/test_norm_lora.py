"""RMSNorm with y A^T made on the way: the norm, the sum it is of, the product, and zeros beside it."""

import pytest
import torch

from fastllm.kernels.norm_lora import rms_norm_with_product

from . import eager
from .parity import OverLimit, Setting, assert_parity
from .test_copy_lora import WideBuffer, lora_a
from .test_rms_norm import EPS, LIMITS, uneven_rows


def check_norm(
    setting: Setting,
    rows: int,
    width: int,
    *,
    rank: int = 5,
    extension: int = 8,
    offset: float = 0.0,
    eps: float = EPS,
    has_residual: bool = True,
    x_dtype: torch.dtype | None = None,
    has_kept: bool = True,
) -> None:
    """x and residual are parts of wider matrices, of rows that eps matters in; they stay what they are.

    The norm made again from the sum has the same bits.
    """
    wide = uneven_rows(setting, rows, 2 * width + 7).to(x_dtype or setting.dtype)
    before = wide.clone()
    x, residual = wide[:, 3 : width + 3], wide[:, -width:] if has_residual else None
    weight = setting.randn(2 * width, dtype=x_dtype)[::2] + 1
    a, buffer = lora_a(setting, rank, extension, width), WideBuffer(setting, rows, width, extension)
    again = WideBuffer(setting, rows, width, extension)
    with setting.active():
        total, rstd = rms_norm_with_product(
            x, weight, eps, a, rank, offset=offset, residual=residual, out=buffer.y, low_rank=buffer.low_rank,
            kept=buffer.kept if has_kept else None,
        )  # fmt: skip
        from_total = rms_norm_with_product(
            total, weight, eps, a, rank, offset=offset, out=again.y, low_rank=again.low_rank
        )  # fmt: skip
    assert wide.equal(before)
    if residual is None:
        assert total is x
    elif not (total.dtype == x.dtype and total.equal(x + residual)):
        raise OverLimit("the sum is not x + residual")
    theirs, truth = (
        eager.rms_norm(s, w, eps, offset=offset)
        for s, w in ((total, weight), (total.double(), weight.double()))
    )  # fmt: skip
    assert_parity("y", buffer.y, theirs.to(setting.dtype), truth, LIMITS["y"])
    rstd_eager, rstd_truth = (torch.rsqrt(t.square().mean(-1) + eps) for t in (total.float(), total.double()))
    assert_parity("rstd", rstd, rstd_eager, rstd_truth, LIMITS["y"])
    buffer.check_product(a, rank, has_kept=has_kept)
    if not (from_total[1].equal(rstd) and again.y.equal(buffer.y) and again.low_rank.equal(buffer.low_rank)):
        raise OverLimit("other bits from the sum")


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (5, 61), (33, 150), (67, 300)], ids=str)
def test_matches_float64(setting, shape, has_residual):
    check_norm(setting, *shape, has_residual=has_residual)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_offset_and_eps(setting, eps):
    check_norm(setting, 19, 70, offset=1.0, eps=eps)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_whole_tiles(setting, width):
    check_norm(setting, 32, width)


@pytest.mark.parametrize(("rank", "extension"), [(1, 8), (8, 8), (16, 64), (19, 64), (48, 64), (64, 64), (48, 128)])
def test_ranks(setting, rank, extension):
    check_norm(setting, 17, 70, rank=rank, extension=extension)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
def test_dtype_of_y_follows_out(setting, x_dtype, has_residual):
    """An fp32 residual stream normalised straight into the compute dtype, with one rounding; and the reverse."""
    check_norm(setting, 19, 150, x_dtype=x_dtype, has_residual=has_residual)


def test_product_kept_in_one_place_only(setting):
    check_norm(setting, 19, 70, has_kept=False)


def test_no_rows(fp32):
    check_norm(fp32, 0, 32)


def test_broken_values_stay_in_their_row(setting):
    x, a = setting.randn(3, 100), setting.randn(8, 100, scale=0.1)
    x[1, 7] = float("nan")
    buffer = WideBuffer(setting, 3, 100, 8)
    with setting.active():
        rms_norm_with_product(x, torch.ones_like(x[0]), EPS, a, 5, out=buffer.y, low_rank=buffer.low_rank)
    for part in (buffer.y, buffer.low_rank[:, :5]):
        assert part[1].isnan().all() and part[[0, 2]].isfinite().all()

"""Rows copied with x A^T made on the way: the copy, the product, and zeros beside it."""

import pytest
import torch

from fastllm.kernels.copy_lora import copy_with_product, serves_rows

from .conftest import see_capability
from .parity import Limit, OverLimit, Setting, assert_parity

# One rounding, of a sum that fp32 makes of exact products, or of those of three passes.
PRODUCT = Limit(1.1, 2.5e-6)


class WideBuffer:
    """The room for y beside y A^T, with a gap behind, and for the copy of y A^T; all of it NaN."""

    def __init__(self, setting: Setting, rows: int, width: int, extension: int) -> None:
        nan = {"dtype": setting.dtype, "device": setting.device}
        self.whole = torch.full((rows, width + extension + 3), float("nan"), **nan)
        self.y, self.low_rank, self.gap = self.whole.split((width, extension, 3), 1)
        self.kept = torch.full((rows, extension), float("nan"), **nan)

    def check_product(self, a: torch.Tensor, rank: int, *, has_kept: bool) -> None:
        """y A^T is that of the y that was written, zeros follow it, and nothing else was written."""
        if self.low_rank[:, rank:].count_nonzero():  # NaN counts
            raise OverLimit("values past the rank")
        a = a[:rank].t()
        assert_parity("y A^T", self.low_rank[:, :rank], self.y @ a, self.y.double() @ a.double(), PRODUCT)
        if not (self.kept.equal(self.low_rank) if has_kept else self.kept.isnan().all()):
            raise OverLimit("the copy is not y A^T")
        assert self.gap.isnan().all(), "wrote past the columns of low_rank"


def lora_a(setting: Setting, rank: int, extension: int, width: int) -> torch.Tensor:
    """A of a wider buffer; what follows its first rows is no number."""
    a = setting.randn(extension, width + 5, scale=width**-0.5)[:, :width]
    a[rank:] = float("nan")
    return a


def check_copy(
    setting: Setting,
    rows: int,
    width: int,
    *,
    rank: int = 5,
    extension: int = 8,
    x_dtype: torch.dtype | None = None,
    has_kept: bool = True,
) -> None:
    """x is part of a wider matrix, and stays what it is."""
    wide = setting.randn(rows, width + 7, dtype=torch.float32).to(x_dtype or setting.dtype)
    x, before = wide[:, 3 : width + 3], wide.clone()
    a, buffer = lora_a(setting, rank, extension, width), WideBuffer(setting, rows, width, extension)
    with setting.active():
        copy_with_product(
            x, a, rank, out=buffer.y, low_rank=buffer.low_rank, kept=buffer.kept if has_kept else None
        )  # fmt: skip
    assert wide.equal(before)
    if not buffer.y.equal(x.to(setting.dtype)):
        raise OverLimit("the copy is not x")
    buffer.check_product(a, rank, has_kept=has_kept)


@pytest.mark.parametrize("shape", [(1, 1), (5, 61), (33, 150), (67, 300)], ids=str)
def test_matches_float64(setting, shape):
    check_copy(setting, *shape)


@pytest.mark.parametrize(("rank", "extension"), [(1, 8), (8, 8), (16, 64), (19, 64), (48, 64), (64, 64), (48, 128)])
def test_ranks(setting, rank, extension):
    check_copy(setting, 17, 70, rank=rank, extension=extension)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_rounded_once(setting, x_dtype):
    check_copy(setting, 19, 150, x_dtype=x_dtype)


def test_product_kept_in_one_place_only(setting):
    check_copy(setting, 19, 70, has_kept=False)


def test_no_rows(fp32):
    check_copy(fp32, 0, 32)


def test_which_rows_it_serves(monkeypatch, device):
    x = torch.zeros(4096, 32, device=device)
    with Setting("triton", torch.float32, device).active():
        assert serves_rows(x, 1) and serves_rows(x, 64)
        assert not serves_rows(x, 0) and not serves_rows(x, 65)
        assert serves_rows(x[:4095], 16) == (not x.is_cuda)
        if x.is_cuda:
            see_capability(monkeypatch, 7, 5)
            assert not serves_rows(x, 16)
    with Setting("reference", torch.float32, device).active():
        assert not serves_rows(x, 16)

"""LoRA's term inside FP8 products: how many bits it keeps, at whatever size, and what it leaves to the rest."""

import pytest
import torch

from fastllm.kernels.fp8 import CAPABILITY, Fp8Matrix, Fp8Weight, extension_width, quantize_rows, quantize_weight
from fastllm.kernels.fp8_low_rank import Term, fp8_input_grad, fp8_linear, write_right

from .parity import OverLimit, Setting
from .test_fp8 import PRODUCT, relative

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY,
    reason="this GPU has no FP8 products",
)
# Of the sum of two numbers of e4m3, where it is not one of the smallest: half a unit of the eighth bit.
TWO_PARTS = 2.0**-8
# Half of the step below 2^-6, under the scale of a row.
SMALLEST = 2.0**-10


def parts_of(matrix: Fp8Matrix, rank: int) -> list[torch.Tensor]:
    """The three blocks of columns of a term, float64; what comes after them has to be zero."""
    columns = matrix.values[:, : matrix.extension].double()
    if columns[:, 3 * rank :].count_nonzero():  # NaN counts
        raise OverLimit("values past the ranks")
    return list(columns[:, : 3 * rank].split(rank, dim=1))


def as_near(value: torch.Tensor, truth: torch.Tensor) -> None:
    if not ((value - truth).abs() <= TWO_PARTS * truth.abs() + SMALLEST).all():
        raise OverLimit(f"{((value - truth).abs() / (TWO_PARTS * truth.abs() + SMALLEST)).max():.2f} times the limit")


def check_left(setting: Setting, rank: int = 5, columns: int = 100) -> None:
    """L in columns of its own, beside X: both under a scale that has room for the larger."""
    x, left = setting.randn(6, columns), setting.randn(6, 2 * rank)[:, ::2]
    left = left * torch.tensor([1e-4, 1e-2, 1, 30, 1e3, 0], device=setting.device)[:, None].to(setting.dtype)
    x[2] *= torch.tensor(0.0, dtype=setting.dtype)
    balance = 2.0 ** setting.integers(-3, 3, rank).float()
    found = Fp8Matrix.empty(6, columns, setting.device, rank=rank)
    found.values.view(torch.uint8).fill_(7)
    with setting.active():
        quantize_rows(x, left=left, balance=balance, out=found)
        alone = quantize_rows(x)
    high, again, low = parts_of(found, rank)
    term = left.double() * balance.double()
    largest = torch.maximum(x.double().abs().amax(1), term.abs().amax(1))
    if not (found.scales.double() * 448 >= largest).all() or (found.scales.double() * 224 > largest).any():
        raise OverLimit(f"scales {found.scales} for {largest}")
    as_near(high + low, term / found.scales.double()[:, None])
    if not high.equal(again):
        raise OverLimit("the upper part is not there twice")
    same = found.scales == alone.scales
    if not found.plain.values[same].double().equal(alone.values[same].double()):
        raise OverLimit("other values of x")


@pytest.mark.parametrize("rank", [1, 5, 16, 22])
def test_left_factor(setting, rank):
    check_left(setting, rank)


def check_balance(setting: Setting, rows: int, rank: int) -> None:
    """R in columns of its own; ranks of any size use the same part of the range, and one of zeros none."""
    sizes = torch.logspace(-6, 3, rank, device=setting.device)
    right = setting.randn(rank, rows, dtype=torch.float32).t() * sizes
    right[:, 1] = 0
    right[rows - 1, 0] = 100 * sizes[0]
    scales = 2.0 ** setting.integers(-6, 1, rows).float()
    matrix = Fp8Matrix(torch.full((rows, extension_width(rank)), 7, dtype=torch.uint8, device=setting.device).view(
        torch.float8_e4m3fn), scales, extension_width(rank))  # fmt: skip
    with setting.active():
        balance = write_right(matrix, right)
    high, low, again = parts_of(matrix, rank)
    truth = right.double() / scales.double()[:, None]
    if balance[1] or not balance.isfinite().all():
        raise OverLimit(f"balance {balance}")
    if not high.equal(again):
        raise OverLimit("the upper part is not there twice")
    as_near(high + low, truth / balance.double().where(balance != 0, 1))
    largest = high.abs().amax(0)
    if not ((largest >= 64) & (largest <= 128)).logical_xor(balance == 0).all():
        raise OverLimit(f"largest {largest}")


@pytest.mark.parametrize(("rows", "rank"), [(40, 5), (17, 16), (700, 48)])
def test_right_factor(setting, rows, rank):
    check_balance(setting, rows, rank)


def weight_of(setting: Setting, rank: int) -> tuple[torch.Tensor, Fp8Weight]:
    """A weight whose rows differ in size; one is next to nothing, one is zero."""
    matrix = setting.randn(48, 64, dtype=torch.float32) * 0.02 * 2.0 ** setting.integers(-2, 2, 48).float()[:, None]
    matrix[3] *= 1e-6
    matrix[5] = 0
    weight = Fp8Weight(Fp8Matrix.empty(48, 64, setting.device, rank=rank))
    quantize_weight(matrix, out=weight.by_output)
    return matrix.double(), weight


def check_term(setting: Setting, size: float, rank: int = 5) -> None:
    """Both products with a term of any size: the sum is as near as FP8 comes, and so is what the term adds to it."""
    with setting.active():
        matrix, weight = weight_of(setting, rank)
    x, dy = setting.randn(19, 64), setting.randn(19, 48)
    left, back = setting.randn(19, rank, scale=0.6), setting.randn(19, rank)
    b, a = setting.randn(48, rank, scale=size), setting.randn(rank, 64, scale=0.1 * size)
    for rows, product, factors, plain in (
        (x, fp8_linear, Term(left, b), x.double() @ matrix.t()),
        (dy, fp8_input_grad, Term(back, a.t()), dy.double() @ matrix),
    ):
        added = factors.left.double() @ factors.right.double().t()
        with setting.active():
            found, without = product(rows, weight, factors).double(), product(rows, weight).double()
        if not relative(found, plain + added) <= PRODUCT:
            raise OverLimit(f"{relative(found, plain + added):.4f} off with a term of {size}")
        # Sums in 16 bits round more of a small term than FP8 does; the large one leaves X fewer bits.
        computed_in = torch.bfloat16 if setting.device.type == "cuda" else setting.dtype
        rounding = torch.finfo(computed_in).eps * float(found.norm() / added.norm()) if size else 0.0
        if 0 < size < 1 and not relative(found - without, added) <= 0.02 + rounding:
            raise OverLimit(f"a term of {size} is {relative(found - without, added):.4f} off")
        if not size and not found.equal(without):
            raise OverLimit("a term of nothing changes the sum")


@pytest.mark.parametrize("size", [0.0, 2e-4, 0.02, 1.0, 100.0])
def test_term_of_any_size(setting, size):
    check_term(setting, size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["left", "right"])
def test_what_is_not_finite_stays_visible(setting, bad, factor):
    with setting.active():
        _, weight = weight_of(setting, 3)
        term = Term(setting.randn(4, 3), setting.randn(48, 3))
        getattr(term, factor)[1, 1] = bad
        found = fp8_linear(setting.randn(4, 64), weight, term)
    assert (found.isnan() if factor == "right" else found[1].isnan()).all()
    assert factor == "right" or found[[0, 2, 3]].isfinite().all()


def test_no_rows(setting):
    with setting.active():
        _, weight = weight_of(setting, 3)
        assert fp8_linear(setting.randn(0, 64), weight, Term(setting.randn(0, 3), setting.randn(48, 3))).shape == (
            0,
            48,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2e-4, 2e-3])
def test_a_gpu_adds_up_a_small_term(size):
    """Of a term that is a few thousandths of the product: the part that comes through on average."""
    setting = Setting("triton", torch.bfloat16, torch.device("cuda"))
    x, matrix = setting.randn(4096, 4096), setting.randn(4096, 4096, scale=0.02)
    left, right = setting.randn(4096, 16, scale=0.6), setting.randn(4096, 16, scale=size)
    weight = Fp8Weight(Fp8Matrix.empty(4096, 4096, setting.device, rank=16))
    quantize_weight(matrix, out=weight.by_output)
    added = (left.float() @ right.float().t()).double()
    change = fp8_linear(x, weight, Term(left, right)).double() - fp8_linear(x, weight).double()
    assert abs(float((change * added).sum() / added.square().sum()) - 1) < 0.05

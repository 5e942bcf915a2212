"""Quantizers against llama.cpp: the same bytes where its encoder is a formula, no more error where it searches."""

import gguf
import numpy as np
import pytest
import torch

from fastllm.gguf.container import GGUFError
from fastllm.gguf.quantizers import quantizer_of
from fastllm.gguf.quantizers.base import LARGEST_F16
from fastllm.gguf.quantizers.grids import CodebookGrid
from fastllm.gguf.tensor_types import TENSOR_TYPES

WIDTH = 1024
PLAIN = ["F32", "F16", "BF16"]
EXACT = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
SEARCHED_WITH_IMPORTANCE = [*SEARCHED, "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
QUANTIZED = [name for name in TENSOR_TYPES if name not in PLAIN]


def weights_like(kind: str) -> np.ndarray:
    """Rows [8, WIDTH] of the sorts of weights that models have, and of those that break encoders."""
    random = np.random.default_rng(7)
    normal = 0.02 * random.standard_normal((8, WIDTH))
    rows = {
        "normal": lambda: normal,
        "student t, 5": lambda: 0.02 * random.standard_t(5, (8, WIDTH)),
        "student t, 3": lambda: 0.02 * random.standard_t(3, (8, WIDTH)),
        "laplace": lambda: random.laplace(0, 0.02, (8, WIDTH)),
        "uniform": lambda: random.uniform(-0.05, 0.05, (8, WIDTH)),
        "outlier columns": lambda: normal * np.where(random.random(WIDTH) < 0.01, 20, 1),
        "rows of many scales": lambda: normal * np.exp(random.standard_normal((8, 1))),
        "bfloat16": lambda: torch.from_numpy(normal).bfloat16().double().numpy(),
        "integers": lambda: np.round(normal * 200) / 100,
        "sparse": lambda: normal * (random.random((8, WIDTH)) < 0.1),
        "half zero": lambda: normal * (np.arange(WIDTH) % 512 < 256),
        "positive": lambda: np.abs(normal),
        "negative": lambda: -np.abs(normal),
        "constant": lambda: np.full((8, WIDTH), 0.37),
        "negative constant": lambda: np.full((8, WIDTH), -0.37),
        "two values": lambda: 0.02 * np.sign(normal),
        "zero": lambda: np.zeros((8, WIDTH)),
        "one outlier": lambda: np.where(np.arange(WIDTH) == 77, 1.0, 0.0) * np.ones((8, 1)),
        "small": lambda: normal * 1e-5,
        "denormal": lambda: normal * 1e-38,
        "large": lambda: normal * 1e5,
    }
    return rows[kind]().astype(np.float32) + np.float32(0)  # -0 to 0


KINDS = """normal|student t, 5|student t, 3|laplace|uniform|outlier columns|rows of many scales|bfloat16|integers|sparse
half zero|positive|negative|constant|negative constant|two values|zero|one outlier|small|denormal|large""".replace(
    "\n", "|"
).split("|")


def importance_of_columns() -> np.ndarray:
    return np.exp(np.random.default_rng(3).standard_normal(WIDTH)).astype(np.float32)


def encode(name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    weights = None if importance is None else torch.from_numpy(importance)
    return quantizer_of(TENSOR_TYPES[name]).encode(torch.from_numpy(rows), weights).numpy()


def squared_error(name: str, encoded: np.ndarray, rows: np.ndarray, importance: np.ndarray | None) -> float:
    residual = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[name]).astype(np.float64) - rows
    return float((residual**2 * (1 if importance is None else importance)).sum())


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_random_bytes_decode_as_in_the_gguf_package(name):
    kind = TENSOR_TYPES[name]
    data = np.random.default_rng(0).integers(0, 256, (3, 64 * kind.block_bytes), dtype=np.uint8)
    if name not in PLAIN:  # keep the f16 scales finite: clear the exponent's top bit wherever one may lie
        data &= 0xBF
    theirs = (
        gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
        if name not in ("F32", "F16")
        else (data.view(np.float32 if name == "F32" else np.float16).astype(np.float32))
    )
    ours = quantizer_of(kind).decode(torch.from_numpy(data)).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("name", QUANTIZED)
def test_decoded_weights_encode_to_no_error(name):
    """Weights that lie on the grid of the type already: exact up to the rounding of a scale to f16."""
    quantizer = quantizer_of(TENSOR_TYPES[name])
    once = quantizer.decode(quantizer.encode(torch.from_numpy(weights_like("normal"))))
    twice = quantizer.decode(quantizer.encode(once))
    first = (once - torch.from_numpy(weights_like("normal"))).norm()
    assert (twice - once).norm() <= 0.35 * first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
def test_formulas_give_the_bytes_of_llama_cpp(judge, name, kind):
    rows = weights_like(kind)
    assert np.array_equal(encode(name, rows), judge.quantize(name, rows))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_formulas_give_the_bytes_of_the_gguf_package(name):
    rows = weights_like("normal")
    assert np.array_equal(encode(name, rows), gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name]))


def test_ties_are_broken_as_in_llama_cpp(judge):
    """Weights of few mantissa bits fall on halves, and blocks whose largest weight is there with both signs."""
    random = np.random.default_rng(1)
    rows = (random.integers(-8, 9, (64, WIDTH)) / 8).astype(np.float32)
    for name in EXACT:
        assert np.array_equal(encode(name, rows), judge.quantize(name, rows)), name


def test_q8_0_ignores_importance_as_llama_cpp_does(judge):
    rows = weights_like("normal")
    assert np.array_equal(encode("Q8_0", rows, importance_of_columns()), judge.quantize("Q8_0", rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "weighted"), [*((name, False) for name in SEARCHED), *((name, True) for name in SEARCHED_WITH_IMPORTANCE)]
)
def test_searches_leave_no_more_error_than_llama_cpp(judge, name, weighted, kind):
    rows = weights_like(kind)
    importance = importance_of_columns() if weighted else None
    ours, theirs = encode(name, rows, importance), judge.quantize(name, rows, importance)
    assert judge.is_valid(name, ours)
    # Where weights repeat, both are exact up to the f16 rounding of scales, which falls by chance: 2^-11 of a product,
    # and weights that are differences of two products up to three times as large.
    energy = (rows.astype(np.float64) ** 2 * (1 if importance is None else importance)).sum()
    rounding_of_scales = energy * (2.0**-11 * 3) ** 2
    error = squared_error(name, ours, rows, importance)
    assert error <= max(squared_error(name, theirs, rows, importance), rounding_of_scales)


@pytest.mark.parametrize("name", SEARCHED_WITH_IMPORTANCE)
def test_importance_moves_the_error_to_columns_that_matter_less(name):
    rows, importance = weights_like("normal"), importance_of_columns()
    with_it = squared_error(name, encode(name, rows, importance), rows, importance)
    assert with_it < 0.97 * squared_error(name, encode(name, rows), rows, importance)


@pytest.mark.parametrize("name", SEARCHED_WITH_IMPORTANCE)
def test_importance_of_zero_says_nothing(name):
    """An expert that no calibration token met: as without importance (or as with equal importance)."""
    rows, none = weights_like("normal"), np.zeros(WIDTH, np.float32)
    assert np.array_equal(encode(name, rows, none), encode(name, rows))
    half = np.where(np.arange(WIDTH) < WIDTH // 2, 1.0, 0.0).astype(np.float32)
    dark = encode(name, rows, half)
    assert squared_error(name, dark, rows, 1 - half) < 0.2 * (rows[:, WIDTH // 2 :] ** 2).sum()


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_rows_do_not_depend_on_the_rows_beside_them(name):
    rows, importance = weights_like("student t, 3"), importance_of_columns()
    whole = encode(name, rows, importance)
    many = encode(name, np.tile(rows, (40, 1)), importance)  # several chunks
    if name in SEARCHED_WITH_IMPORTANCE:  # sums are rounded in another order, which decides near ties
        once, repeated = (squared_error(name, data, rows, importance) for data in (whole, many[-8:]))
        assert repeated == pytest.approx(once, rel=1e-3)
    else:
        assert np.array_equal(many, np.tile(whole, (40, 1)))


def test_negative_zeros_give_the_bytes_of_llama_cpp(judge):
    rows = np.zeros((2, WIDTH), np.float32)
    rows[0], rows[1, ::3] = -0.0, -0.0
    for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q5_0"):
        assert np.array_equal(encode(name, rows), judge.quantize(name, rows)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_K"])
def test_any_float_dtype_and_layout(name, dtype):
    rows = torch.from_numpy(weights_like("normal")).to(dtype)
    quantizer = quantizer_of(TENSOR_TYPES[name])
    expected = quantizer.encode(rows.float())
    assert torch.equal(quantizer.encode(rows), expected)
    assert torch.equal(quantizer.encode(rows.t().contiguous().t()), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_weights_that_are_not_finite_are_refused(name, value):
    rows = torch.zeros(2, WIDTH)
    rows[1, 5] = value
    with pytest.raises(GGUFError, match="a weight is"):
        quantizer_of(TENSOR_TYPES[name]).encode(rows)


def test_weights_beyond_f16_are_refused_where_a_scale_is_f16():
    rows = torch.full((1, WIDTH), 2 * LARGEST_F16)
    for name in TENSOR_TYPES:
        if name in ("F32", "BF16"):
            quantizer_of(TENSOR_TYPES[name]).encode(rows)
        else:
            with pytest.raises(GGUFError, match="bf16 or f32"):
                quantizer_of(TENSOR_TYPES[name]).encode(rows)


@pytest.mark.parametrize("bad", [torch.ones(WIDTH + 1), -torch.ones(WIDTH), torch.full((WIDTH,), float("nan"))])
def test_importance_that_makes_no_sense_is_refused(bad):
    with pytest.raises(GGUFError, match="importance"):
        quantizer_of(TENSOR_TYPES["Q4_K"]).encode(torch.zeros(2, WIDTH), bad)


def test_the_codebook_finds_the_nearest_value_everywhere():
    values = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    grid = CodebookGrid(values)
    y = torch.linspace(-200, 200, 40_001, dtype=torch.float64).float() + 1e-3
    nearest = torch.tensor(values)[(y[:, None] - torch.tensor(values)).abs().argmin(1)].float()
    found = grid.nearest(y.clone())
    assert torch.equal(found, nearest)
    assert torch.equal(grid.decode(grid.codes(found)), found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_the_gpu_gives_the_error_of_the_cpu(name, device):
    rows, importance = torch.from_numpy(weights_like("student t, 5")), torch.from_numpy(importance_of_columns())
    quantizer = quantizer_of(TENSOR_TYPES[name])
    on_cpu = squared_error(name, quantizer.encode(rows, importance).numpy(), rows.numpy(), importance.numpy())
    on_gpu = quantizer.encode(rows.to(device), importance.to(device)).cpu().numpy()
    assert squared_error(name, on_gpu, rows.numpy(), importance.numpy()) == pytest.approx(on_cpu, rel=1e-3)

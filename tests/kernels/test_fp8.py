"""FP8 products of frozen weights: the bits of the quantisation, the error of the products, and what they leave alone.

The error allowed is derived. A value that e4m3 holds as a normal number is off by at most 2^-4 of itself, a smaller one
by half a step of 2^-9 times its row's scale. For normal numbers that is 2.2 % to 2.7 % in the L2 norm, by where their
spread falls among the powers of two, and sqrt(2) times as much of a product of two such matrices.
"""

import dataclasses
import functools

import pytest
import torch

from fastllm.kernels import fp8
from fastllm.kernels.decoder_layer import DecoderLayer, Keep, decoder_layer
from fastllm.kernels.fp8 import (
    CAPABILITY,
    Fp8Matrix,
    Fp8Weight,
    quantize_rows,
    quantize_weight,
    scaled_matmul,
    scaled_matmul_reference,
    transpose_values,
)
from fastllm.kernels.fp8_low_rank import fp8_input_grad, fp8_linear
from fastllm.kernels.kept_weights import KeptForm, KeptWeights
from fastllm.kernels.lora import Projection, ProjectionGroup, input_grad, prepare, project, project_group
from fastllm.kernels.projections import fp8_obstacle

from ..determinism import deterministic
from .parity import OverLimit, Setting
from .quantized import quantize
from .test_decoder_layer import Spec, call_of, layer_of, parameters_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY,
    reason="this GPU has no FP8 products",
)
# rel_l2 of one rounding to e4m3, and of a product of two rounded matrices: theory and a tenth, for chance.
ONE_ROUNDING, PRODUCT = 0.029, 0.042
EVERY_VALUE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def rows_of_all_kinds(setting: Setting, columns: int = 100) -> torch.Tensor:
    """Rows of several magnitudes, one of zeros, one of ties, one that reaches into the small steps."""
    x = setting.randn(6, columns) * torch.tensor([1e-3, 1, 200, 0, 1, 1], device=setting.device)[:, None].to(
        setting.dtype
    )
    x[4] = (torch.arange(columns, device=setting.device) / 16).to(setting.dtype)
    x[4, 0] = 448
    x[5] = x[5] * torch.logspace(-20, 0, columns, 2, device=setting.device).to(setting.dtype)
    return x


def nearest(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Each value's nearest of all that e4m3 has, the even one where two are as near; float64."""
    table = EVERY_VALUE[:127].float().double().to(x.device)  # the last one is NaN
    magnitude = (x.double() / scales.double()[:, None]).abs()
    distance = (magnitude[..., None] - table).abs()
    best = distance.amin(-1, keepdim=True)
    candidates = (distance == best).long()
    even = torch.arange(127, device=x.device) % 2 == 0
    index = (candidates * (1 + even.long())).argmax(-1)
    return table[index] * x.double().sign() * scales.double()[:, None]


def check_quantize(setting: Setting, x: torch.Tensor | None = None, factors: torch.Tensor | None = None) -> Fp8Matrix:
    """Every value is the nearest, under the least power of two that lets the row's largest in."""
    x = rows_of_all_kinds(setting) if x is None else x
    with setting.active():
        found = quantize_rows(x, factors=factors)
    exact = x.double() if factors is None else x.double() * factors.double()
    largest = exact.abs().amax(1)
    powers = 2.0 ** torch.ceil(torch.log2(largest.cpu() / 448))  # exact on a CPU
    expected = torch.where(largest == 0, 1.0, powers.to(largest.device))
    if not found.scales.double().equal(expected):
        raise OverLimit(f"scales {found.scales}, expected {expected}")
    different = found.dequantized(torch.float64).ne(nearest(exact, expected)).sum().item()
    if different:
        raise OverLimit(f"{different} values are not the nearest")
    return found


@pytest.mark.parametrize("columns", [1, 16, 100, 515])
def test_every_value_is_the_nearest(setting, columns):
    x = rows_of_all_kinds(setting, 515)
    check_quantize(setting, x[:, :columns].contiguous())


def test_strided_rows_and_columns(setting):
    x = rows_of_all_kinds(setting, 64)
    check_quantize(setting, x[::2, 3:50])
    check_quantize(setting, x.t().contiguous().t())


def check_factors(setting: Setting) -> None:
    factors = torch.tensor([0.25, 1.0, 8.0, 2.0**-10], device=setting.device).repeat(25)
    check_quantize(setting, factors=factors)


def test_factors_of_the_columns(setting):
    check_factors(setting)


def check_wide_rows(setting: Setting) -> None:
    """More values than registers hold, the largest in the first part of one row, in the last of the other."""
    x, factors = setting.randn(2, 16500), torch.tensor([0.5, 2.0], device=setting.device).repeat(8250)
    x[0, 5], x[1, -3] = 60, -50
    check_quantize(setting, x, factors)


def test_wide_rows(setting):
    check_wide_rows(setting)


def test_into_rows_of_a_larger_matrix(setting):
    x = rows_of_all_kinds(setting)
    with setting.active():
        whole = Fp8Matrix.empty(10, 100, setting.device)
        quantize_rows(x, out=whole.rows(slice(2, 8)))
        alone = quantize_rows(x)
    assert whole.values[2:8].view(torch.uint8).equal(alone.values.view(torch.uint8))
    assert whole.scales[2:8].equal(alone.scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(setting, bad):
    x = rows_of_all_kinds(setting)
    x[1, 7] = bad
    with setting.active():
        found = quantize_rows(x).dequantized(torch.float32)
    assert found[1].isnan().all() and found[[0, 2, 3, 4, 5]].isfinite().all()


def test_no_rows(setting):
    with setting.active():
        assert quantize_rows(setting.randn(0, 32)).values.shape == (0, 32)
        assert fp8_linear(setting.randn(0, 32), weight_of(setting.randn(16, 32))).shape == (0, 16)


def check_transposed(setting: Setting, rows: int, columns: int) -> None:
    values = setting.integers(0, 255, rows, columns).to(torch.uint8)
    found = Fp8Matrix.empty(columns, rows, values.device, rank=3)
    found.values.view(torch.uint8).fill_(7)
    with setting.active():
        source = Fp8Matrix(values.view(torch.float8_e4m3fn), torch.ones(rows, device=values.device))
        transpose_values(source, out=found.plain)
    if not found.plain.values.view(torch.uint8).equal(values.t()):
        raise OverLimit("not the transpose")
    if not (found.values[:, : found.extension].view(torch.uint8) == 7).all():
        raise OverLimit("wrote to the columns of the term")


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (16, 144), (130, 67)], ids=str)
def test_transposed(fp32, shape):
    check_transposed(fp32, *shape)


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def weight_of(matrix: torch.Tensor, *, rank: int = 0) -> Fp8Weight:
    weight = Fp8Weight(Fp8Matrix.empty(*matrix.shape, matrix.device, rank=rank))
    quantize_weight(matrix, out=weight.by_output)
    return weight


def check_weight(setting: Setting) -> None:
    """Rows far smaller than the matrix's largest value share a scale; each value is still as near as FP8 comes."""
    parts = 2.0 ** torch.tensor([0, -4, -7, -9, -12, -16], device=setting.device)
    matrix = setting.randn(6, 512, dtype=torch.float32).clamp(-4, 4) * parts[:, None]
    with setting.active():
        found = weight_of(matrix.to(setting.dtype)).by_output
    if not (found.scales[3:] == found.scales[3]).all() or (found.scales[:3] == found.scales[1:4]).any():
        raise OverLimit(f"scales {found.scales}")
    for row, value in zip(matrix.to(setting.dtype), found.dequantized(torch.float64), strict=True):
        if not relative(value, row.double()) <= ONE_ROUNDING:
            raise OverLimit(f"{relative(value, row.double()):.4f} off")


def test_rows_that_are_small_beside_the_others(setting):
    check_weight(setting)


def check_products(setting: Setting, rows: int = 67, columns: int = 192, width: int = 128) -> None:
    """X W^T and dY W against float64, in the norm and element by element. Channels and tokens differ in size."""
    channels = 2.0 ** setting.integers(-3, 4, columns).float()
    weight = setting.randn(columns, width, dtype=torch.float32) * channels[:, None]
    tokens = 2.0 ** setting.integers(-3, 4, rows).float()
    x = (setting.randn(rows, width, dtype=torch.float32) * tokens[:, None]).to(setting.dtype)
    dy = setting.randn(rows, columns)
    with setting.active():
        quantized = weight_of(weight.to(setting.dtype))
        y, dx = fp8_linear(x, quantized), fp8_input_grad(dy, quantized)
    wide = weight.to(setting.dtype).double()
    for name, value, left, right in (("y", y, x.double(), wide.t()), ("dx", dx, dy.double(), wide)):
        truth = left @ right
        if not relative(value, truth) <= PRODUCT:
            raise OverLimit(f"{name}: {relative(value, truth):.4f} > {PRODUCT}")
        small = 2.0**-17  # half a step, as a part of the row's largest, for what lies below the normal numbers
        bound = (left.abs() * (1 + 2**-4) + small * left.abs().amax(1, keepdim=True)) @ (right.abs() * (1 + 2**-4))
        bound -= left.abs() @ right.abs()
        if name == "y" and not ((value.double() - truth).abs() <= bound + 2**-8 * truth.abs()).all():
            raise OverLimit(f"{name}: an element is off by more than its terms allow")
    # The gradient is that of the weights that the forward multiplied with: only dY's rounding is left.
    used = dy.double() @ quantized.by_output.dequantized(torch.float64)
    if not relative(dx, used) <= ONE_ROUNDING:
        raise OverLimit(f"dx: {relative(dx, used):.4f} from the gradient of the forward's weights")


def test_products(setting):
    check_products(setting)


def test_gradients_want_e4m3_rather_than_e5m2():
    """Rows of a heavy-tailed gradient, spread over six decades: the finer step counts for more than the range."""
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(256, 512, generator=generator) * torch.randn(256, 512, generator=generator).exp()
    dy *= 10 ** (6 * torch.rand(256, 1, generator=generator) - 6)
    e5m2_scales = dy.abs().amax(1, keepdim=True) / 57344
    e5m2 = (dy / e5m2_scales).to(torch.float8_e5m2).float() * e5m2_scales
    e4m3 = quantize_rows(dy).dequantized(torch.float32)
    assert relative(e4m3, dy.double()) < 0.028 < 0.045 < relative(e5m2, dy.double())


# Groups with LoRA


def group_of(setting: Setting, weights: str, *, is_fp8: bool = True, dropout: float = 0.0) -> ProjectionGroup:
    setting.generator.manual_seed(1)
    projections = []
    for rows in (32, 48):
        weight = setting.randn(rows, 128, scale=128**-0.5, dtype=torch.float32)
        a, b = setting.randn(5, 128, scale=128**-0.5, dtype=torch.float32), setting.randn(rows, 5, dtype=torch.float32)
        projections.append(
            Projection(
                quantize(weight)[0] if weights == "nf4" else weight.to(setting.dtype),
                setting.randn(rows), a.requires_grad_(), b.requires_grad_(), 0.5, dropout,
            )
        )  # fmt: skip
    return ProjectionGroup(projections, is_fp8=is_fp8)


def run_group(setting: Setting, group: ProjectionGroup, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    trained = {f"{name}{i}": getattr(p, name) for i, p in enumerate(group.projections) for name in ("lora_a", "lora_b")}
    with setting.active():
        y = project_group(x, group)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y))
    found = {"y": y.detach(), "x": x.grad, **{name: t.grad for name, t in trained.items()}}
    for tensor in trained.values():
        tensor.grad = None
    return found


def check_group(setting: Setting, weights: str, dropout: float = 0.0) -> None:
    """Beside the same group without FP8: the products differ as FP8 does, the gradients of LoRA not at all."""
    x = setting.randn(3, 9, 128)
    ours = run_group(setting, group_of(setting, weights, dropout=dropout), x)
    plain = run_group(setting, group_of(setting, weights, is_fp8=False, dropout=dropout), x)
    for name, value in ours.items():
        error = relative(value, plain[name].double())
        limit = PRODUCT if name in ("y", "x") else 4 * torch.finfo(setting.dtype).eps
        if not error <= limit:
            raise OverLimit(f"{name}: {error:.2e} > {limit:.2e}")
    if not all(relative(ours[name], plain[name].double()) > 1e-3 for name in ("y", "x")):
        raise OverLimit("the products are not in FP8")


@pytest.mark.usefixtures("narrow_extension")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("weights", ["nf4", "dense"])
def test_group(setting, weights, dropout):
    check_group(setting, weights, dropout)


def check_kept(setting: Setting, weights: tuple[str, str]) -> None:
    """Products with kept weights are those with weights made anew, also after a dense one was edited in place."""
    projections = [group_of(setting, kind).projections[i] for i, kind in enumerate(weights)]
    group, kept = ProjectionGroup(projections, is_fp8=True), KeptForm()
    x, dy = setting.randn(9, group.in_features), setting.randn(9, group.out_features)
    for _ in range(2):
        with setting.active(), torch.no_grad():
            for _ in range(2):
                found, expected = prepare(group, setting.dtype, kept=kept), prepare(group, setting.dtype)
                if not project(found, x)[0].equal(project(expected, x)[0]):
                    raise OverLimit("y of other weights")
                if not input_grad(found, dy, [])[0].equal(input_grad(expected, dy, [])[0]):
                    raise OverLimit("dx of other weights")
        if kept.nbytes != group.kept_bytes(setting.dtype):
            raise OverLimit("bytes that are not counted")
        for projection in projections:
            if not projection.is_packed:
                projection.weight.data.mul_(-3)


@pytest.mark.parametrize("weights", [("nf4", "nf4"), ("nf4", "dense"), ("dense", "dense")], ids="-".join)
def test_kept_weights(reference, weights):
    check_kept(reference, weights)


def test_kept_weights_are_transposed_once(reference, monkeypatch):
    calls, real = [], fp8.transpose_values
    monkeypatch.setattr(fp8, "transpose_values", lambda matrix, *, out: calls.append(matrix) or real(matrix, out=out))
    layer, x, _ = fp8_layer(reference, LAYER, is_fp8=True)
    for kept, expected in ((KeptWeights(), [4, 4]), (None, [8, 12])):
        for count in expected:
            with reference.active():
                decoder_layer(x, layer, call_of(reference, LAYER, kept_weights=kept)).sum().backward()
            assert len(calls) == count


def test_obstacles():
    frozen = Projection(torch.zeros(16, 32))
    assert fp8_obstacle([frozen]) is None
    assert "multiple of 16" in str(fp8_obstacle([frozen, Projection(torch.zeros(24, 32))]))
    assert "trained" in str(fp8_obstacle([dataclasses.replace(frozen, weight=torch.zeros(16, 32).requires_grad_())]))


def fp8_layer(setting: Setting, spec: Spec, *, is_fp8: bool) -> tuple[DecoderLayer, torch.Tensor, list[torch.Tensor]]:
    """(layer, x, trained tensors), the same numbers each time."""
    setting.generator.manual_seed(2)
    tensors = parameters_of(setting, spec)
    quantized = {name: quantize(t.float())[0] for name, t in tensors.items() if name.endswith("weight")}
    layer = layer_of(spec, tensors | quantized)
    changed = {
        name: ProjectionGroup(getattr(layer, name).projections, is_fp8=is_fp8)
        for name in ("qkv", "output", "gate_up", "down")
    }
    x = setting.randn(spec.batch, spec.length, spec.width).requires_grad_()
    return (
        dataclasses.replace(layer, **changed),
        x,
        [t.requires_grad_() for name, t in tensors.items() if "lora" in name],
    )


def run_layer(setting: Setting, spec: Spec, *, is_fp8: bool = True, **changes) -> list[torch.Tensor]:
    """y and every gradient."""
    layer, x, trained = fp8_layer(setting, spec, is_fp8=is_fp8)
    torch.manual_seed(3)
    with setting.active():
        y = decoder_layer(x, layer, call_of(setting, spec, **changes))
        y.backward(setting.randn(*y.shape))
    return [y.detach(), x.grad, *(t.grad for t in trained)]


LAYER = Spec(has_head_norms=True, has_bias=True)


@pytest.fixture
def reference(device: torch.device) -> Setting:
    """The kernels' own bits are settled above; interpreted, a layer of them takes long."""
    return Setting("triton" if device.type == "cuda" else "reference", torch.float32, device)


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.OFFLOADED_INPUT, Keep.OFFLOADED_ATTENTION])
def test_a_layer_gives_the_same_bits_however_it_keeps(reference, keep):
    run, kept = functools.partial(run_layer, reference, LAYER, choose_backend=lambda *_: "triton"), KeptWeights()
    with deterministic():
        expected = run()
        assert all(map(torch.equal, run(keep=keep), expected))
        for _ in range(2):
            assert all(map(torch.equal, run(keep=keep, kept_weights=kept), expected))
    layer, _, _ = fp8_layer(reference, LAYER, is_fp8=True)
    assert kept.nbytes == sum(group.kept_bytes(reference.dtype) for group in layer.groups())


def check_layer_in_fp8(setting: Setting, spec: Spec = LAYER) -> None:
    """Eight products on a gradient's way, and what attention and norms make of their errors."""
    ours, plain = run_layer(setting, spec), run_layer(setting, spec, is_fp8=False)
    errors = [relative(value, truth.double()) for value, truth in zip(ours, plain, strict=True)]
    assert errors[0] > 1e-3 and max(errors[1:]) > 1e-3
    if not (errors[0] < 2 * PRODUCT and max(errors[1:]) < 5 * PRODUCT):
        raise OverLimit(f"{errors}")


@pytest.mark.parametrize("changes", [{}, {"is_merged": True}, {"has_out_norms": True}, {"dropout": 0.2}], ids=str)
def test_a_layer_beside_one_in_16_bit(reference, changes):
    check_layer_in_fp8(reference, dataclasses.replace(LAYER, **changes))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16, 16), (67, 48, 128), (300, 4096, 1024)], ids=str)
def test_the_product_of_a_gpu_is_the_reference(shape):
    rows, columns, width = shape
    setting = Setting("triton", torch.bfloat16, torch.device("cuda"))
    left, right = quantize_rows(setting.randn(rows, width)), quantize_rows(setting.randn(columns, width))
    truth = scaled_matmul_reference(left, right, torch.float64)
    found = scaled_matmul(left, right, torch.bfloat16)
    assert relative(found, truth) < 4e-3
    out = torch.empty_like(found)
    assert scaled_matmul(left, right, torch.bfloat16, out=out) is out
    assert out.equal(found)

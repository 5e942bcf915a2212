"""Groups of 4-bit weights of which one is dequantised at a time."""

import dataclasses
import functools

import pytest
import torch

from fastllm.kernels import lora, weights_in_turn
from fastllm.kernels.kept_weights import KeptWeights
from fastllm.kernels.layer_definition import Keep
from fastllm.kernels.lora import prepare
from fastllm.kernels.nf4 import Nf4Weight, dequantize_nf4
from fastllm.kernels.weights_in_turn import _pieces, spares_memory_in_turn

from ..determinism import deterministic
from .layers import Spec, call_of, layer_of, parameters_of
from .parity import Setting
from .quantized import quantize
from .test_decoder_layer import check_layer, run_layer
from .test_lora import DROPOUT, GROUPS, IN_FEATURES, check_group, group_of, tensors_of
from .test_lora import Spec as GroupSpec
from .test_small_updates import shares

# Triton's interpreter computes masked lanes too, in numpy.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("narrow_extension")]


def check_in_turn(setting: Setting, specs: list[GroupSpec]) -> None:
    """Output and gradients within the limits of a group whose weights are joined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "prepare", functools.partial(prepare, in_turn=True))
        check_group(setting, specs, weights="nf4")


@pytest.mark.parametrize("name", ["no_lora", "gate_up", "qkv_bias", "one_bias", "hole", "first_plain", "dropout"])
def test_matches_float64(setting, name):
    check_in_turn(setting, DROPOUT if name == "dropout" else GROUPS[name])


# 128 rows of a weight begin a nested block of its statistics.
IN_PIECES = [GroupSpec(300, 8), GroupSpec(130, 4, has_bias=True)]


def check_in_pieces(setting: Setting, specs: list[GroupSpec]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_in_turn, "_MOST_VALUES", 140 * IN_FEATURES)
        check_in_turn(setting, specs)


@pytest.mark.parametrize("specs", [IN_PIECES, IN_PIECES[:1], DROPOUT], ids=["two", "one", "dropout"])
def test_weights_in_pieces_match_float64(setting, specs):
    check_in_pieces(setting, specs)


def test_pieces_are_alike_and_begin_blocks(fp32, monkeypatch):
    monkeypatch.setattr(weights_in_turn, "_MOST_VALUES", 300 * 128)
    sizes = {}
    for shape, is_nested in (((700, 128), True), ((700, 128), False), ((100, 128), True), ((700, 96), True)):
        weight, _, _ = quantize(fp32.randn(*shape, dtype=torch.float32), is_nested=is_nested)
        pieces = _pieces(weight)
        sizes[shape, is_nested] = [piece.stop - piece.start for piece in pieces]
        with fp32.active():
            whole = dequantize_nf4(weight, fp32.dtype)
            if len(pieces) > 1:
                assert torch.cat([dequantize_nf4(weight.rows(piece), fp32.dtype) for piece in pieces]).equal(whole)
    assert list(sizes.values()) == [[256, 256, 188], [234, 234, 232], [100], [700]]


@pytest.mark.parametrize("shape", [(37, 97), (5, 33), (3, 64)], ids=str)
def test_a_weight_in_one_piece_may_end_inside_a_block(fp32, shape):
    weight, _, _ = quantize(fp32.randn(*shape, dtype=torch.float32))
    (piece,) = _pieces(weight)
    with fp32.active():
        assert dequantize_nf4(weight.rows(piece), fp32.dtype).equal(dequantize_nf4(weight, fp32.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_are_not_lost(device, monkeypatch, dtype):
    monkeypatch.setattr(lora, "prepare", functools.partial(prepare, in_turn=True))
    found = shares(Setting("triton" if device.type == "cuda" else "reference", dtype, device), 100, "nf4")
    for name in ("y", "dx"):
        assert found[name] == pytest.approx(1, abs=0.2), found


def test_one_is_there_at_a_time(fp32):
    """With its rows of B, in the memory of the one before; nothing is held before a loop begins."""
    specs = GROUPS["qkv_bias"]
    tensors = tensors_of(fp32, specs)
    group = group_of(specs, tensors | {f"weight{i}": quantize(tensors[f"weight{i}"])[0] for i in range(len(specs))})
    with fp32.active():
        prepared = prepare(group, fp32.dtype, in_turn=True)
        assert prepared.in_turn is not None and prepared.joined is None and not prepared.weights
        places = set()
        for (rows, matrix), projection in zip(prepared.in_turn, group.projections, strict=True):
            assert isinstance(projection.weight, Nf4Weight) and prepared.b is not None
            weight, b = matrix.split([IN_FEATURES, group.extension], dim=1)
            assert weight.equal(dequantize_nf4(projection.weight, fp32.dtype)) and b.equal(prepared.b[rows])
            places.add(matrix.data_ptr())
    assert len(places) == 1


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of each group that is prepared, how many weights it has, and whether they are taken in turn."""
    found, real = [], lora.prepare

    def watched(group, *rest, **options):
        found.append((len(group.projections), options["in_turn"]))
        return real(group, *rest, **options)

    monkeypatch.setattr(lora, "prepare", watched)
    return found


# 14 rows: few beside 128 columns of q, k and v, or 256 of gate and up.
LAYERS = {
    "recomputed": Spec(keep=Keep.OFFLOADED_INPUT),
    "kept": Spec(has_bias=True),
    "attention_away": Spec(keep=Keep.OFFLOADED_ATTENTION, has_head_norms=True),
    "dropout": Spec(keep=Keep.INPUT, dropout=0.2),
    "out_norms": Spec(keep=Keep.OFFLOADED_INPUT, has_out_norms=True, trains_norms=True, offset=1.0),
    "no_lora": Spec(keep=Keep.INPUT, has_lora=False, trains_norms=True),
}
LAYERS = {name: dataclasses.replace(spec, heads=8, key_heads=4) for name, spec in LAYERS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS.keys())
def test_layer_matches_float64(device, taken, spec, dtype):
    """The kernels' own bits are settled elsewhere; interpreted, a layer of them takes long."""
    setting = Setting("triton" if device.type == "cuda" else "reference", dtype, device)
    check_layer(setting, spec, frees_weights=True)
    assert set(taken) == {(3, True), (2, True), (1, False)}


def test_bits_of_deterministic_mode_are_those_of_other_plans(fp32, taken):
    """There a plan may not add up in another order."""
    spec, keep = Spec(), Keep.OFFLOADED_INPUT
    with deterministic():
        expected, _ = run_layer(fp32, spec, keep, call_of(fp32, spec))
        found, _ = run_layer(fp32, spec, keep, call_of(fp32, spec, frees_weights=True))
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    assert not any(in_turn for _, in_turn in taken)


@pytest.mark.parametrize(
    ("length", "options"), [(7, {}), (40, {"frees_weights": True}), (7, {"frees_weights": True, "kept_weights": True})]
)
def test_weights_are_joined_where_that_spares_no_memory(fp32, taken, length, options):
    """Without being asked, with many rows, and where they are kept."""
    spec = Spec(length=length)
    kept = KeptWeights() if "kept_weights" in options else None
    run_layer(fp32, spec, Keep.INPUT, call_of(fp32, spec, **options | {"kept_weights": kept}))
    assert taken and not any(in_turn for _, in_turn in taken)


def test_what_has_to_pay_is_the_fp32_sum_of_the_gradient(fp32):
    """A quarter of what joined weights and the gradient take is left, and the sum is narrower than the weights."""
    layer = layer_of(Spec(), parameters_of(fp32, Spec()))
    tensors = {name: quantize(t)[0] if "weight" in name else t for name, t in parameters_of(fp32, Spec()).items()}
    packed = layer_of(Spec(), tensors)
    most = {"qkv": 21, "gate_up": 42}  # 6 * 21 < 128 and 6 * 42 < 256
    for name, rows in most.items():
        group = getattr(packed, name)
        assert spares_memory_in_turn(group, rows) and not spares_memory_in_turn(group, rows + 1)
        assert not spares_memory_in_turn(getattr(layer, name), 1), "dense weights are used where they lie"
    assert not any(spares_memory_in_turn(group, 0) for group in (packed.output, packed.down))

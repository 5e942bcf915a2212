"""Dequantised weights that stay from pass to pass: the same bits, and never those of weights that are no more."""

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from fastllm.kernels import lora, weight_forms
from fastllm.kernels.decoder_layer import Keep, decoder_layer
from fastllm.kernels.kept_weights import KeptForm, KeptWeights
from fastllm.kernels.lora import PreparedGroup, Projection, ProjectionGroup, prepare

from .parity import OverLimit, Setting
from .quantized import quantize
from .test_decoder_layer import Spec, call_of, layer_of, parameters_of

pytestmark = pytest.mark.usefixtures("narrow_extension")
COLUMNS = 128


def group_of(setting: Setting, *, rank: int = 4, dense: bool = False) -> ProjectionGroup:
    """Two 4-bit projections with LoRA, or a 4-bit and a dense one."""
    projections = []
    for rows in (24, 40):
        weight = setting.randn(rows, COLUMNS, dtype=torch.float32)
        is_dense = dense and projections
        a, b = setting.randn(rank, COLUMNS, dtype=torch.float32), setting.randn(rows, rank, dtype=torch.float32)
        projections.append(Projection(weight if is_dense else quantize(weight)[0], None, a, b, 0.5))
    return ProjectionGroup(projections)


def exchanged(group: ProjectionGroup, **changes) -> ProjectionGroup:
    """The group with other fields in its first weight."""
    first, *rest = group.projections
    weight = dataclasses.replace(first.weight, **changes)
    return ProjectionGroup([dataclasses.replace(first, weight=weight), *rest])


def rewritten(name: str) -> Callable[[ProjectionGroup], ProjectionGroup]:
    """A tensor of the first weight gets other values in place, as `load_state_dict` writes them."""

    def change(group: ProjectionGroup) -> ProjectionGroup:
        getattr(group.projections[0].weight, name).add_(1)
        return group

    return change


def replaced(name: str) -> Callable[[ProjectionGroup], ProjectionGroup]:
    """A tensor of the first weight is exchanged for another one."""

    def change(group: ProjectionGroup) -> ProjectionGroup:
        return exchanged(group, **{name: getattr(group.projections[0].weight, name) + 1})

    return change


def unchanged(group: ProjectionGroup) -> ProjectionGroup:
    return group


def adapters_trained(group: ProjectionGroup) -> ProjectionGroup:
    for projection in group.projections:
        projection.lora_a.add_(1)
        projection.lora_b.mul_(-2)
    return group


def dense_edited(group: ProjectionGroup) -> ProjectionGroup:
    """As PEFT merges an adapter: past every version counter."""
    group.projections[1].weight.data.mul_(2)
    return group


def adapter_removed(group: ProjectionGroup) -> ProjectionGroup:
    return ProjectionGroup([Projection(projection.weight) for projection in group.projections])


TENSORS = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")
CHANGES = {
    "nothing": unchanged,
    "adapters_trained": adapters_trained,
    "adapter_removed": adapter_removed,
    **{f"{name}_rewritten": rewritten(name) for name in TENSORS},
    **{f"{name}_replaced": replaced(name) for name in TENSORS},
}


def matrices(prepared: PreparedGroup) -> list[torch.Tensor]:
    return [prepared.weights[0][1], *(part for part in (prepared.a, prepared.b) if part is not None)]


def check_follows(setting: Setting, change: Callable[[ProjectionGroup], ProjectionGroup], **options) -> None:
    """What is prepared after a change has the bits that it has without anything kept."""
    group, kept = group_of(setting, **options), KeptForm()
    dtype = setting.dtype if setting.dtype != torch.float32 else torch.float64
    with setting.active():
        for _ in range(2):
            prepare(group, dtype, kept=kept)
        before = matrices(prepare(group, dtype))
        group = change(group)
        expected, found = matrices(prepare(group, dtype)), matrices(prepare(group, dtype, kept=kept))
    assert change is unchanged or len(before) != len(expected) or not all(map(torch.equal, before, expected))
    if not all(map(torch.equal, expected, found)):
        raise OverLimit("stale weights")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_is_followed(setting, change):
    check_follows(setting, change)


def test_a_dense_weight_beside_a_4_bit_one_is_copied_each_time(setting):
    check_follows(setting, dense_edited, dense=True)


def check_dtypes(setting: Setting) -> None:
    """A pass in another dtype, as under autocast."""
    group, kept = group_of(setting), KeptForm()
    for dtype in (torch.float64, torch.float16, torch.float64):
        with setting.active():
            expected, found = prepare(group, dtype), prepare(group, dtype, kept=kept)
        for left, right in zip(matrices(expected), matrices(found), strict=True):
            if left.dtype != right.dtype or not left.equal(right):
                raise OverLimit("weights of another dtype")


def test_every_dtype_has_its_own(fp32):
    check_dtypes(fp32)


def test_dequantised_once(fp32, monkeypatch):
    group, kept, calls = group_of(fp32), KeptForm(), []
    real = weight_forms.dequantize_nf4
    monkeypatch.setattr(
        weight_forms, "dequantize_nf4", lambda *args, **options: calls.append(1) or real(*args, **options)
    )
    with fp32.active():
        for _ in range(3):
            prepare(group, torch.float16, kept=kept)
        assert len(calls) == 2 and kept.nbytes == group.kept_bytes(torch.float16)
        prepare(rewritten("packed")(group), torch.float16, kept=kept)
    assert len(calls) == 4


def test_nothing_is_kept_of_dense_weights(fp32):
    group, kept = ProjectionGroup([Projection(fp32.randn(16, COLUMNS))]), KeptForm()
    with fp32.active():
        prepare(group, torch.float16, kept=kept)
    assert kept.nbytes == group.kept_bytes(torch.float16) == 0


def test_the_memory_of_the_weights_is_held_with_their_form(fp32):
    """Its address can't become another weight's; `clear` frees both."""
    group, kept = group_of(fp32), KeptForm()
    with fp32.active():
        prepare(group, torch.float16, kept=kept)
    packed = weakref.ref(group.projections[0].weight.packed)
    del group
    gc.collect()
    assert packed() is not None
    kept.clear()
    gc.collect()
    assert packed() is None and kept.nbytes == 0


def test_a_copied_model_makes_its_own(fp32):
    kept = KeptWeights()
    with fp32.active():
        prepare(group_of(fp32), torch.float16, kept=kept.form("qkv"))
    assert kept.nbytes > 0 and copy.deepcopy(kept).nbytes == 0


def steps_of(setting: Setting, spec: Spec, keep: Keep, kept: KeptWeights | None) -> list[torch.Tensor]:
    """Outputs and gradients of two passes over a layer whose adapters change in between."""
    setting.generator.manual_seed(0)
    tensors, call = parameters_of(setting, spec), call_of(setting, spec, keep=keep, kept_weights=kept)
    x, layer = setting.randn(spec.batch, spec.length, spec.width).requires_grad_(), layer_of(spec, tensors)
    trained = [t.requires_grad_() for name, t in tensors.items() if "lora" in name]
    found = []
    for _ in range(2):
        with setting.active():
            y = decoder_layer(x, layer, call)
            y.sum().backward()
        found += [y.detach(), *(t.grad.clone() for t in (x, *trained))]
        with torch.no_grad():
            for t in trained:
                t.sub_(0.1 * t.grad.sign()).grad = None
        x.grad = None
    return found


@pytest.mark.parametrize("keep", [Keep.ALL, Keep.INPUT])
def test_a_layer_gives_the_same_bits(fp32, keep):
    spec, kept = Spec(has_head_norms=True), KeptWeights()
    expected = steps_of(fp32, spec, keep, None)
    assert all(map(torch.equal, steps_of(fp32, spec, keep, kept), expected))
    layer = layer_of(spec, parameters_of(fp32, spec))
    assert kept.nbytes == sum(group.kept_bytes(fp32.dtype) for group in layer.groups())


def test_weights_that_are_freed_in_between_give_the_same_bits(fp32, monkeypatch):
    """One group of a layer is there at a time, for one dequantisation more of three of the four."""
    spec, prepared, real = Spec(keep=Keep.INPUT), [], lora.prepare
    tensors = parameters_of(fp32, spec)
    layer, found, counts = layer_of(spec, tensors), [], []
    monkeypatch.setattr(
        lora, "prepare", lambda group, *rest, **kept: prepared.append(group) or real(group, *rest, **kept)
    )
    for frees in (False, True):
        x = torch.ones(spec.batch, spec.length, spec.width, device=fp32.device, requires_grad=True)
        prepared.clear()
        with fp32.active():
            y = decoder_layer(x, layer, call_of(fp32, spec, frees_weights=frees))
            y.sum().backward()
        found.append((y.detach(), x.grad))
        counts.append(len(prepared))
    assert all(map(torch.equal, *found)) and counts == [4 + 4, 4 + 3 + 4]


def test_closed_between_forward_and_backward(fp32):
    """A backward that is still to come has the same result and keeps nothing."""
    spec, kept = Spec(), KeptWeights()
    tensors, x = parameters_of(fp32, spec), fp32.randn(spec.batch, spec.length, spec.width).requires_grad_()
    layer, grads = layer_of(spec, tensors), []
    for close in (False, True):
        with fp32.active():
            y = decoder_layer(x, layer, call_of(fp32, spec, kept_weights=kept))
            if close:
                kept.close()
            y.sum().backward()
        grads.append(x.grad)
        x.grad = None
    assert grads[0].equal(grads[1]) and kept.nbytes == 0

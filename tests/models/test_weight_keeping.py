"""Layers keep their dequantised weights where memory is left over: with the same bits, and no longer than wanted."""

import copy
import dataclasses
import gc
import tempfile
import weakref

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastllm import FastLanguageModel
from fastllm.kernels.decoder_layer import DecoderLayer, Keep, Norm
from fastllm.kernels.lora import Projection, ProjectionGroup
from fastllm.kernels.nf4 import Nf4Weight
from fastllm.models import memory
from fastllm.models.arch import get_arch
from fastllm.models.lora_view import forget_groups
from fastllm.models.memory import GIB, ActivationPlanner, LayerBytes
from fastllm.models.model_methods import PLANNER
from fastllm.models.patch import adapt, restore
from fastllm.models.recordings import Recordings
from fastllm.models.weight_keeping import WeightKeeper

from ..kernels.parity import OverLimit
from ..kernels.repetition import repeat
from .families import FAMILIES, batch, build, fast_copy, step, with_lora

CONFIG = FAMILIES["llama"]
pytestmark = pytest.mark.usefixtures("full_host")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "llama"
    build(CONFIG).save_pretrained(path)
    return path


@pytest.fixture
def model(folder, device, monkeypatch):
    """A 4-bit model with LoRA whose planner sees a free card."""
    return four_bit(folder, device, monkeypatch)


def four_bit(folder, device, monkeypatch, *, free=64 * GIB):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map={"": str(device)}
    )
    adapt(loaded, get_arch("llama"), "fastllm")
    return with_lora(loaded)


def planner_of(model):
    return getattr(model.get_base_model(), PLANNER)


def kept_by(model):
    """(number of layers that hold weights, bytes held)"""
    keeper = planner_of(model)._weights
    return len(keeper._layers), keeper.nbytes


def train(model, device, steps=3):
    """Losses and gradients of a few optimiser steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for seed in range(steps):
        found.append(step(model, batch(CONFIG, seed=seed, device=device)))
        optimizer.step()
    return found


def assert_same(left, right):
    for ours, theirs in zip(left, right, strict=True):
        different = [name for name, grad in ours.grads.items() if not torch.equal(grad, theirs.grads[name])]
        if ours.loss != theirs.loss or different:
            raise OverLimit(f"loss {ours.loss} and {theirs.loss}; gradients that differ: {different}")


def test_training_has_the_same_bits(folder, device, monkeypatch):
    results = []
    for free in (64 * GIB, 0):
        model = four_bit(folder, device, monkeypatch, free=free)
        if not free:
            planner_of(model).use(False)
        results.append(train(model, device))
        assert kept_by(model)[0] == (4 if free else 0)
    assert_same(*results)


def test_a_recording_holds_the_weights_that_it_reads(model, device):
    """They are freed between a forward and its backward, as by a longer batch: not before the backward is done."""
    planner = planner_of(model)
    planner.recordings = Recordings(lambda device: repeat)
    inputs = batch(CONFIG, device=device, length=64)
    for _ in range(4):
        step(model, inputs)
    assert planner.recordings.count == (0 if device.type == "cuda" else 1)  # in fp32 a GPU has no kernel that can be
    held = [weakref.ref(form) for kept in planner._weights._layers.values() for form in kept.held()]
    assert len(held) == 4 * 4
    loss = model(**inputs).loss
    planner.release_weights("a longer batch came")
    gc.collect()
    assert {form() is not None for form in held} == {device.type == "cpu"}
    loss.backward()
    del loss
    gc.collect()
    assert all(form() is None for form in held)


@pytest.mark.parametrize("setting", [False, True, "offload"])
def test_other_settings_keep_nothing(model, device, setting):
    planner_of(model).use(setting)
    train(model, device, steps=1)
    assert kept_by(model) == (0, 0)


def test_the_line_and_the_report_tell_it(model, device, messages):
    train(model, device)
    assert messages().count("4 keep; 4 keep their dequantised weights") == 1
    assert "4 keep their dequantised weights" in str(model.fast_report())


def test_a_16_bit_base_has_nothing_to_keep(device, messages):
    model = with_lora(fast_copy(build(CONFIG, device=device), setting="fastllm"))
    train(model, device, steps=1)
    assert kept_by(model) == (0, 0) and "dequantised" not in messages()


LEAVING = {
    "for_inference": lambda model, folder: model.for_inference(),
    "generate": lambda model, folder: model.generate(
        torch.full((1, 3), 5, device=model.device), max_new_tokens=1, do_sample=False
    ),
    "setting": lambda model, folder: model.for_training(True),
    "restore": lambda model, folder: restore(model.get_base_model()),
}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING.keys())
def test_freed_when_training_ends(model, device, messages, tmp_path, leave):
    train(model, device, steps=1)
    planner, held = planner_of(model), kept_by(model)[1]
    assert held > 0
    leave(model, tmp_path)
    assert planner._weights.nbytes == 0
    assert messages().count("the dequantised weights of 4 layers") == 1


def test_freed_when_the_model_is_saved(checkpoint, tmp_path, monkeypatch, messages):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 64 * GIB)
    model, _ = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=64)
    model = FastLanguageModel.get_peft_model(model, r=8)
    ids = torch.randint(6, 400, (2, 16), device=model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    assert kept_by(model)[1] > 0
    model.save_pretrained_merged(tmp_path / "merged")
    assert kept_by(model)[1] == 0 and "freed: the model is saved" in messages()


def test_training_that_goes_on_keeps_them_again(model, device):
    inputs = batch(CONFIG, device=device)
    expected, held = step(model, inputs), kept_by(model)
    model.for_inference()
    model.for_training()
    assert_same([step(model, inputs)], [expected])
    assert kept_by(model) == held and held[1] > 0


def test_a_replaced_base_weight_is_followed(model, device):
    """Another 4-bit weight in a layer's place, as merging an adapter puts one there."""
    inputs = batch(CONFIG, device=device)
    before = step(model, inputs)
    layer = model.get_base_model().model.layers[2].mlp.down_proj.base_layer
    dense = torch.randn(CONFIG.hidden_size, CONFIG.intermediate_size, generator=torch.Generator().manual_seed(5)) * 0.1
    layer.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4").to(device)
    after = step(model, inputs)
    planner_of(model).use(False)
    assert_same([after], [step(model, inputs)])
    assert before.loss != after.loss


def check_exchanged_state(device):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        build(CONFIG).save_pretrained(folder)
        model = four_bit(folder, device, patch)
        inputs = batch(CONFIG, device=device)
        before = step(model, inputs)
        state = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.quant_state
        state.absmax = state.absmax.flip(0)
        after = step(model, inputs)
        forget_groups(model)
        planner_of(model).use(False)
        assert_same([after], [step(model, inputs)])
        assert before.loss != after.loss


def test_an_exchanged_quantisation_state_is_followed(device):
    check_exchanged_state(device)


def test_a_copied_model_shares_nothing(model, device):
    train(model, device, steps=1)
    assert kept_by(copy.deepcopy(model))[1] == 0


# Planner arithmetic: an 8B model in NF4 with LoRA of rank 16, as shapes.


def large_layer():
    def group(columns, *rows):
        projections = []
        for n in rows:
            packed = torch.empty(n * columns // 2, dtype=torch.uint8, device="meta")
            weight = Nf4Weight(packed, packed, packed, (n, columns), 64, compute_dtype=torch.bfloat16)
            a, b = torch.empty(16, columns, device="meta"), torch.empty(n, 16, device="meta")
            projections.append(Projection(weight, None, a, b))
        return ProjectionGroup(projections)

    norm = Norm(torch.empty(4096, device="meta"), 1e-5)
    return DecoderLayer(
        norm, group(4096, 4096, 1024, 1024), group(4096, 4096), norm, group(4096, 14336, 14336),
        group(14336, 4096), "silu", 128,
    )  # fmt: skip


def plan(monkeypatch, free, *, tokens=8192, setting="fastllm", layer=None):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    planner = ActivationPlanner(32, setting)
    made = planner._make_plan(layer or large_layer(), tokens, torch.device("cuda"), torch.bfloat16)
    return made, planner._weights.num_layers


def test_8b_on_an_80_gb_card_keeps_everything(monkeypatch):
    """4 x 2048 tokens: 21 GiB of activations, 13 GiB of weights."""
    sizes = LayerBytes.of(large_layer(), torch.bfloat16)
    made, weights = plan(monkeypatch, 72 * GIB)
    assert made == [Keep.ALL] * 32 and weights == 32
    assert 13 * GIB < 32 * sizes.kept_weights < 15 * GIB
    assert 21 * GIB < 32 * 8192 * sizes.stash < 22 * GIB


@pytest.mark.parametrize("free", [8, 16, 24, 30, 34, 38, 42, 46, 50, 60, 72])
def test_weights_come_after_activations_and_fit(monkeypatch, free):
    sizes = LayerBytes.of(large_layer(), torch.bfloat16)
    made, weights = plan(monkeypatch, free * GIB)
    held = 8192 * sum(
        {Keep.ALL: sizes.stash + sizes.layer_input, Keep.INPUT: sizes.layer_input, Keep.OFFLOADED_INPUT: 0}[keep]
        for keep in made
    )
    held -= 8192 * sizes.stash  # of the last layer: its backward takes as much
    assert weights == 0 or made == [Keep.ALL] * 32
    assert held + weights * sizes.kept_weights + sizes.transient(8192) <= 0.94 * free * GIB - GIB // 2
    spare = 0.94 * free * GIB - GIB // 2 - held - sizes.transient(8192) - weights * sizes.kept_weights
    assert weights == 32 or made != [Keep.ALL] * 32 or spare < sizes.kept_weights, "one more layer fits"


def test_a_longer_batch_takes_the_memory(monkeypatch, messages):
    layer, held = large_layer(), {}
    planner = ActivationPlanner(32, "fastllm")
    monkeypatch.setattr(WeightKeeper, "nbytes", property(lambda keeper: sum(held.values())))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 72 * GIB - sum(held.values()))

    def kept_layers(tokens):
        planner._begin(torch.empty(1, tokens, 4096, dtype=torch.bfloat16, device="meta"), layer)
        return planner._weights.num_layers

    assert kept_layers(4096) == 32
    held["weights"] = 32 * LayerBytes.of(layer, torch.bfloat16).kept_weights
    assert kept_layers(2048) == 32, "what the weights take now is theirs to keep"
    fewer = kept_layers(18432)
    assert 0 < fewer < 32
    assert kept_layers(4096) == fewer, "they do not come and go"
    assert kept_layers(65536) == 0 and kept_layers(4096) == 0


def test_layers_beyond_the_plan_are_freed(messages):
    keeper, cpu = WeightKeeper(4), torch.device("cpu")
    keeper.allow(10, 2, cpu, "")
    kept = [keeper.of_layer(index, cpu) for index in range(4)]
    assert None not in kept
    for each in kept:
        each.form("qkv").store([], (), torch.empty(2, dtype=torch.uint8))
    keeper.allow(5, 2, cpu, "a longer batch")
    assert [keeper.of_layer(index, cpu) for index in range(4)] == [None, None, *kept[2:]]
    assert keeper.nbytes == 4 and kept[0].nbytes == 0 and "of 2 layers" in messages()
    assert keeper.of_layer(3, torch.device("meta")) is None, "only on the device that was planned for"


def test_a_layer_without_4_bit_weights_plans_none(monkeypatch):
    layer = large_layer()
    dense = {
        name: ProjectionGroup([
            dataclasses.replace(p, weight=torch.empty(p.weight.shape, dtype=torch.bfloat16, device="meta"))
            for p in getattr(layer, name).projections
        ])
        for name in ("qkv", "output", "gate_up", "down")
    }  # fmt: skip
    assert plan(monkeypatch, 72 * GIB, layer=dataclasses.replace(layer, **dense))[1] == 0

"""What was made of modules holds until something that it was made from changes."""

import copy

import pytest
import torch
from torch import nn

from fastllm.models.arch import get_arch
from fastllm.models.fused_parts import fused_layer
from fastllm.models.patch import decoder_layers
from fastllm.models.watch import Watch

from .families import FAMILIES, build, fast_copy, with_lora


def watched_linear():
    module, watch = nn.Linear(2, 2), Watch()
    watch.entries(module.__dict__, "training", "forward", "scale")
    watch.contents(module._forward_hooks)
    watch.tensors(module, "weight", "bias")
    watch.answer(len, [1, 2])
    return module, watch


def test_nothing_changed():
    module, watch = watched_linear()
    module(torch.ones(1, 2))
    module.weight.data += 1  # other values in the same place
    assert watch.holds()


CHANGES = {
    "a plain attribute": lambda module: module.eval(),
    "an attribute that was not there": lambda module: setattr(module, "scale", 2.0),
    "another parameter": lambda module: setattr(module, "weight", nn.Parameter(torch.ones(2, 2))),
    "new memory": lambda module: setattr(module.weight, "data", torch.ones(2, 2)),
    "whether it is trained": lambda module: module.weight.requires_grad_(False),
    "a hook": lambda module: module.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed(change):
    module, watch = watched_linear()
    outer = Watch()
    outer.include(watch)
    change(module)
    assert not watch.holds() and not outer.holds()


def test_equal_values_and_lists_are_no_change():
    names, settings, watch = ["default"], {"scaling": 1.5}, Watch()
    watch.contents(names)
    watch.entries(settings, "scaling")
    settings["scaling"] = float("1.5")
    assert watch.holds()
    names.append("other")
    assert not watch.holds()


def test_a_copy_starts_anew():
    """Its modules have other dictionaries."""
    _, watch = watched_linear()
    assert not copy.deepcopy(watch).holds() and watch.holds()


@pytest.fixture
def layer():
    model = with_lora(fast_copy(build(FAMILIES["gemma2"]))).train()
    arch = get_arch("gemma2")
    assert arch is not None
    return decoder_layers(model.get_base_model(), arch)[0]


def adapted(layer):
    return layer.self_attn.q_proj


LAYER_CHANGES = {
    "another norm weight": lambda layer: setattr(
        layer.input_layernorm, "weight", nn.Parameter(torch.ones_like(layer.input_layernorm.weight))
    ),
    "the scaling of an adapter": lambda layer: adapted(layer).scaling.update(default=3.0),
    "an adapter that is off": lambda layer: adapted(layer).enable_adapters(False),
    "an adapter that is merged": lambda layer: adapted(layer).merge(),
    "no adapter": lambda layer: setattr(layer.self_attn, "q_proj", adapted(layer).base_layer),
    "another dropout": lambda layer: adapted(layer).lora_dropout.update({"default": nn.Dropout(0.5)}),
    "the activation": lambda layer: setattr(layer.mlp.config, "hidden_activation", "silu"),
    "attention both ways": lambda layer: setattr(layer.self_attn, "is_causal", False),
    "a hook on a part": lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
    "a hook on a projection": lambda layer: adapted(layer).register_forward_pre_hook(lambda *_: None),
    "a hook under an adapter": lambda layer: adapted(layer).base_layer.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", LAYER_CHANGES.values(), ids=LAYER_CHANGES.keys())
def test_a_layer_is_made_anew(layer, change):
    before = fused_layer(layer)
    assert not isinstance(before, str) and fused_layer(layer) is before
    change(layer)
    assert fused_layer(layer) is not before


def test_evaluation_changes_nothing_without_dropout(layer):
    before = fused_layer(layer)
    layer.eval()
    assert fused_layer(layer) is before


def test_a_hook_that_came_and_went_changes_nothing(layer):
    before = fused_layer(layer)
    hook = layer.mlp.register_forward_hook(lambda *_: None)
    assert isinstance(fused_layer(layer), str)
    hook.remove()
    assert fused_layer(layer) is before

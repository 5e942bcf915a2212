"""Retype the modules of one model to fast subclasses, undo it, and report what runs fused.

`module.__class__ = Sub` changes one instance and nothing else: state dict, hooks, names, `isinstance` and saving stay
as they are, and another model of the same class in the same process is untouched.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._errors import ModelError
from .arch import Arch, arch_of
from .fp8_compute import fp8_note
from .lora_view import FP8_COMPUTE, FP8_GRADIENT, forget_groups
from .memory import ActivationPlanner
from .model_methods import PLANNER, ModelMethods
from .module_walks import FastWalks
from .vision_tower import BLOCK_INDEX, TOWER, attach_tower, fused_block, is_vision_block

_ORIGINAL = "_fastllm_original_class"


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer or vision block: `path` is `fused` (one autograd node), `parts` (fused projections) or
    `transformers`."""

    name: str
    path: str
    reason: str = ""


@dataclass(frozen=True)
class FastReport:
    """What a model's layers run, and why not faster. `str()` and `print` give the table."""

    model_type: str
    layers: list[LayerReport] = field(default_factory=list)
    head: str = ""
    activations: str = ""
    notes: list[str] = field(default_factory=list)
    vision: list[LayerReport] = field(default_factory=list)

    @property
    def num_fused(self) -> int:
        return _count_fused(self.layers)

    def __str__(self) -> str:
        lines = [f"fastllm report for {self.model_type}: {self.num_fused} of {len(self.layers)} decoder layers fused"]
        lines += _slower(self.layers, "layers")
        if self.vision:
            lines.append(f"  {_count_fused(self.vision)} of {len(self.vision)} vision blocks fused")
            lines += _slower(self.vision, "vision blocks")
        lines += [f"  {text}" for text in (self.head, self.activations, *self.notes) if text]
        return "\n".join(lines)

    __repr__ = __str__


def decoder_layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    return list(model.get_submodule(arch.layers).children())


def vision_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The fast blocks of the vision tower by name, in the order in which they are called."""
    return {name: module for name, module in model.named_modules() if is_vision_block(module)}


def adapt(model: nn.Module, arch: Arch | None, planner_setting: bool | str) -> None:
    """Retype the modules that `arch` knows; without one, only the model itself, so that it has fastllm's methods."""
    if arch is None:
        _retype(model, type(type(model).__name__, (ModelMethods, type(model)), {"__module__": __name__}))
        return
    found = dict.fromkeys(arch.classes, 0)
    for name, module in model.named_modules():
        fast = arch.classes.get(type(module))
        if fast is None:
            continue
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            raise ModelError("its forward was replaced by somebody else", where=name, fix="adapt the model before that")
        found[type(module)] += 1
        _retype(module, fast)
    missing = [original.__name__ for original, count in found.items() if not count]
    if missing:
        restore(model)
        raise ModelError(
            f"no {', '.join(missing)} found, so it is not built as transformers builds {arch.model_type!r}",
            where=type(model).__name__,
            fix="load it with patch=False",
        )
    layers = decoder_layers(model, arch)
    planner = ActivationPlanner(len(layers), planner_setting)
    for module in (model, *layers):
        setattr(module, PLANNER, planner)
    attach_tower(list(vision_blocks(model).values()), planner)


def adapt_wrapper(peft_model: nn.Module) -> None:
    """Retype a `PeftModel`, which trainers walk through in every step."""
    kind = type(peft_model)
    _retype(peft_model, type(kind.__name__, (FastWalks, kind), {"__module__": __name__}))


def restore(model: nn.Module) -> nn.Module:
    """Give every module of the model its original class back."""
    forget_groups(model)
    planner = model.__dict__.get(PLANNER)
    if planner is not None:
        planner.release_weights("the model has its original classes back")
    for module in model.modules():
        original = module.__dict__.pop(_ORIGINAL, None)
        module.__dict__.pop(PLANNER, None)
        module.__dict__.pop(FP8_COMPUTE, None)
        module.__dict__.pop(FP8_GRADIENT, None)
        module.__dict__.pop(TOWER, None)
        module.__dict__.pop(BLOCK_INDEX, None)
        if original is not None:
            module.__class__ = original
    return model


def report(model: Any) -> FastReport:
    """Which layers and vision blocks of the model run fused, from their present state."""
    from .fused_parts import attention_groups, fused_layer, head_group, mlp_groups

    model = unwrapped(model)
    model_type = model.config.model_type
    arch = arch_of(model.config)
    if arch is None or _ORIGINAL not in model.__dict__ or not hasattr(model, PLANNER):
        return FastReport(model_type, notes=["the model runs transformers' own forward"])
    layers, fp8_groups = [], []
    for index, layer in enumerate(decoder_layers(model, arch)):
        fused = fused_layer(layer)
        name = f"{arch.layers}.{index}"
        halves = {"self_attn": attention_groups, "mlp": mlp_groups}
        found = [find(layer._modules[half]) for half, find in halves.items() if half in layer._modules]
        parts = [part for part in found if not isinstance(part, str)]
        if hasattr(layer.mlp, FP8_COMPUTE):
            fp8_groups.append([group for part in parts for group in part])
        if not isinstance(fused, str):
            layers.append(LayerReport(name, "fused"))
            continue
        layers.append(LayerReport(name, "parts" if parts else "transformers", fused))
    vision = []
    for name, block in vision_blocks(model).items():
        fused = fused_block(block)
        path, reason = ("transformers", fused) if isinstance(fused, str) else ("fused", "")
        vision.append(LayerReport(name, path, reason))
    plain_tower = hasattr(model.config, "vision_config") and not vision
    head = head_group(model)
    return FastReport(
        model_type,
        layers,
        head="head and loss fused" if not isinstance(head, str) else f"loss from full logits: {head}",
        activations=getattr(model, PLANNER).describe(),
        notes=[
            fp8_note(fp8_groups, head),
            *(["the vision tower runs transformers' own forward"] if plain_tower else []),
        ],
        vision=vision,
    )


def unwrapped(model: Any) -> Any:
    """The transformers model under a PEFT model or a distributed wrapper."""
    while True:
        inner = getattr(model, "module", None) if type(model).__name__.endswith("DataParallel") else None
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def _count_fused(layers: list[LayerReport]) -> int:
    return sum(layer.path == "fused" for layer in layers)


def _slower(layers: list[LayerReport], kind: str) -> list[str]:
    """A line for each reason why some are not fused."""
    reasons = Counter((layer.path, layer.reason) for layer in layers if layer.path != "fused")
    return [f"  {count} {kind} run {path}: {reason}" for (path, reason), count in reasons.items()]


def _retype(module: nn.Module, fast: type) -> None:
    setattr(module, _ORIGINAL, type(module))
    module.__class__ = fast

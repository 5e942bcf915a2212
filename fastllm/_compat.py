"""Every difference between versions of a dependency that the code has to know, in one place.

Each entry says which release made it necessary, so that it can go when that release is the oldest supported one.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def attentions_are_collected() -> bool:
    """Whether the present forward was asked for attention weights (`output_attentions=True`)."""
    return "attentions" in _collected()


def collects_outputs() -> bool:
    """Whether the present forward was asked for what its layers give (`output_hidden_states=True`)."""
    return bool(_collected())


def _collected() -> dict[str, Any]:
    """What transformers 5 collects in the present forward, by hooks on the modules that a context variable switches."""
    from transformers.utils import output_capturing

    return output_capturing._active_collector.get() or {}


# Where a PEFT layer holds which of its adapters are on.
ADAPTER_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters")


def adapter_switches(module: Any) -> tuple[tuple[str, ...], tuple[bool, bool]]:
    """(names of the active adapters, (adapters are off, they are merged into the base)) of a PEFT layer.

    PEFT's properties say the same and cost several times as much, for hundreds of layers a step; they are asked where
    its attributes are called otherwise.
    """
    attributes = module.__dict__
    try:
        active, is_off, merged = (attributes[name] for name in ADAPTER_SWITCHES)
    except KeyError:
        names = tuple(getattr(module, "active_adapters", ()))
        return names, (bool(getattr(module, "disable_adapters", False)), bool(getattr(module, "merged", False)))
    return (active,) if isinstance(active, str) else tuple(active), (bool(is_off), bool(merged))


def has_foreign_hooks(module: Any) -> bool:
    """Whether somebody's forward hook or instance-level forward would be skipped by not calling `module`.

    The hooks that transformers 5 leaves behind to collect outputs do not count: `attentions_are_collected` tells when
    they matter.
    """
    if "forward" in module.__dict__ or module._forward_pre_hooks or module._backward_hooks:
        return True
    hooks = module._forward_hooks
    return bool(hooks) and any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks.values())


def has_global_hooks() -> bool:
    """Whether somebody's hook is called for every module. torch has no public question for it."""
    from torch.nn.modules import module

    return bool(module._has_any_global_hook())


def use_expandable_segments() -> bool:
    """Let CUDA's caching allocator grow its segments in place, so that tensors of many sizes leave no holes.

    Does nothing, and returns False, where the user has configured the allocator or the platform has no such segments.
    torch has no public call for it once it is imported; the setting is documented for PYTORCH_CUDA_ALLOC_CONF.
    """
    configured = any(os.environ.get(name) for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    if configured or sys.platform != "linux":
        return False
    from torch.cuda import memory

    memory._set_allocator_settings("expandable_segments:True")
    return True


def default_causal_lm_loss() -> Any:
    """The loss function that transformers gives causal language models, to tell when a user has put another one."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


def recompute_layers(model: Any, wanted: bool) -> None:
    """Switch transformers' own recomputation of layers in the backward. `gradient_checkpointing_enable` became
    `activation_checkpointing_enable` in transformers 5.2x."""
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if wanted:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_disable")()


def composes_angles(rotary_class: Any) -> bool:
    """Whether the rotary module of a model with three positions a token gives one angle a feature. Before transformers
    5.2x each attention layer took all three and chose itself."""
    return hasattr(rotary_class, "recomposition_frequencies")


def take_hidden_states(arguments: dict[str, Any]) -> Any:
    """Remove from the arguments of a vision block, by name, the tensor that it works on. Before transformers 5.20
    the encoder of Llama 3.2 Vision calls it `hidden_state`."""
    return arguments.pop("hidden_states" if "hidden_states" in arguments else "hidden_state")

"""Training and inference modes of a loaded model."""

from __future__ import annotations

from typing import Any

from .._compat import recompute_layers
from .._errors import ArgumentError
from .._notices import warn
from ..text.rendering import tokenizer_of
from .memory import checkpointing_setting
from .model_methods import CHECKPOINTING, PLANNER, TOKENIZER
from .patch import unwrapped


def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
    """Dropout on, no key-value cache, tokenizer pads right. `use_gradient_checkpointing` changes the setting."""
    base = _checked(model)
    planner = getattr(base, PLANNER, None)
    if use_gradient_checkpointing is not None:
        if planner is not None:
            planner.use(use_gradient_checkpointing)
        checkpoint_blocks(base, checkpointing_setting(use_gradient_checkpointing))
    base.config.use_cache = False
    _pad(base, "right")
    return model.train()


def for_inference(model: Any) -> Any:
    """Dropout off, key-value cache on, tokenizer pads left."""
    base = _checked(model)
    release_weights(base, "the model leaves training")
    base.config.use_cache = True
    _pad(base, "left")
    return model.eval()


def release_weights(base: Any, reason: str) -> None:
    """Free the dequantised weights that a model has kept since its last training step."""
    planner = getattr(base, PLANNER, None)
    if planner is not None:
        planner.release_weights(reason)


def release_for_saving(base: Any) -> None:
    """Free what training keeps from step to step, on the device and on the host."""
    planner = getattr(base, PLANNER, None)
    if planner is not None:
        planner.release_weights("the model is saved")
        planner.release_host_memory()


def checkpoint_blocks(base: Any, setting: bool | str) -> None:
    """transformers' own checkpointing for the blocks that no planner looks after: all of a model without fast classes,
    and the vision tower of one that has them. Whatever is not off recomputes every such block."""
    was_on = getattr(base, CHECKPOINTING, False) is not False
    setattr(base, CHECKPOINTING, setting)
    has_tower = getattr(base.config, "vision_config", None) is not None
    if getattr(base, PLANNER, None) is not None and not has_tower:
        return
    if setting is False:
        if was_on:
            recompute_layers(base, False)
    elif base.supports_gradient_checkpointing:
        recompute_layers(base, True)
    else:
        warn(f"{type(base).__name__} can't recompute its layers: use_gradient_checkpointing={setting!r} has no effect")


def _checked(model: Any) -> Any:
    base = unwrapped(model)
    if not hasattr(base, "config") or not hasattr(base, "generate"):
        raise ArgumentError(
            f"got a {type(model).__name__}",
            where="for_inference/for_training",
            fix="pass the model, the first of the two that from_pretrained returns",
        )
    return base


def _pad(base: Any, side: str) -> None:
    tokenizer = getattr(base, TOKENIZER, None)
    if tokenizer is not None:
        tokenizer_of(tokenizer).padding_side = side

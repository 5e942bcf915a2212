"""Training and inference modes of a loaded model."""

from __future__ import annotations

from typing import Any

from .._errors import ArgumentError
from .model_methods import PLANNER, TOKENIZER
from .patch import unwrapped


def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
    """Dropout on, no key-value cache, tokenizer pads right. `use_gradient_checkpointing` changes the setting."""
    base = _checked(model)
    planner = getattr(base, PLANNER, None)
    if planner is not None and use_gradient_checkpointing is not None:
        planner.use(use_gradient_checkpointing)
    base.config.use_cache = False
    _pad(base, "right")
    return model.train()


def for_inference(model: Any) -> Any:
    """Dropout off, key-value cache on, tokenizer pads left."""
    base = _checked(model)
    base.config.use_cache = True
    _pad(base, "left")
    return model.eval()


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
        tokenizer.padding_side = side

"""What fastllm knows of an architecture: one frozen record each, and the table that finds it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# config.model_type -> module of fastllm.models.archs that defines its ARCH
_ARCH_MODULES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3": "qwen3",
}


@dataclass(frozen=True)
class Arch:
    """One architecture.

    `classes` maps each Hugging Face class to the subclass that its instances become. A subclass adds forwards only: it
    keeps the name (transformers writes it into config.json and matches it in places) and has no `__init__`.
    `attention_modules` and `mlp_modules` name the linear layers that LoRA goes to by default.
    """

    model_type: str
    classes: Mapping[type, type]
    layers: str = "model.layers"
    attention_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp_modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    chat_template: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for original, fast in self.classes.items():
            if not issubclass(fast, original) or fast.__name__ != original.__name__ or "__init__" in vars(fast):
                raise TypeError(f"{fast} must subclass {original}, keep its name and define no __init__")


def supported_model_types() -> list[str]:
    return sorted(_ARCH_MODULES)


@functools.cache
def get_arch(model_type: str) -> Arch | None:
    """The record of `config.model_type`, or None for an architecture that has no fast classes."""
    if model_type not in _ARCH_MODULES:
        return None
    return importlib.import_module(f"fastllm.models.archs.{_ARCH_MODULES[model_type]}").ARCH

"""What fastllm knows of an architecture: one frozen record each, and the table that finds it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass

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
    """

    model_type: str
    classes: Mapping[type, type]
    layers: str = "model.layers"
    vision_blocks: str = ""  # where the blocks of a vision tower with fast classes are

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

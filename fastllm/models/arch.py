"""What fastllm knows of an architecture: one frozen record each, and the table that finds it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Each is config.model_type and the module of fastllm.models.archs that defines its ARCH.
_MODEL_TYPES = (
    "gemma", "gemma2", "gemma3", "gemma3_text", "llama", "llava", "mistral", "mistral3", "mllama", "phi3", "qwen2",
    "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_vl",
)  # fmt: skip


@dataclass(frozen=True)
class Arch:
    """One architecture.

    `model`, `decoder` and `vision` map each Hugging Face class to the subclass that its instances become: the model
    with its head and loss, the parts of its language decoder, and the blocks of its vision tower. `decoder` is None for
    a model that is built around the decoder of any other architecture, as LLaVA is. A subclass adds forwards only: it
    keeps the name (transformers writes it into config.json and matches it in places) and has no `__init__`.
    """

    model_type: str
    model: Mapping[type, type]
    decoder: Mapping[type, type] | None
    layers: str = "model.layers"
    vision: Mapping[type, type] = field(default_factory=dict)
    vision_blocks: str = ""

    def __post_init__(self) -> None:
        for original, fast in self.classes.items():
            if not issubclass(fast, original) or fast.__name__ != original.__name__ or "__init__" in vars(fast):
                raise TypeError(f"{fast} must subclass {original}, keep its name and define no __init__")

    @property
    def classes(self) -> dict[type, type]:
        return {**self.model, **(self.decoder or {}), **self.vision}


def supported_model_types() -> list[str]:
    return list(_MODEL_TYPES)


@functools.cache
def get_arch(model_type: str) -> Arch | None:
    """The record of `config.model_type`, or None for an architecture that has no fast classes."""
    if model_type not in _MODEL_TYPES:
        return None
    return importlib.import_module(f"fastllm.models.archs.{model_type}").ARCH


def arch_of(config: Any) -> Arch | None:
    """The record of the model that `config` describes, with the decoder that it is built around; None where the model
    or that decoder has no fast classes."""
    arch = get_arch(config.model_type)
    if arch is None or arch.decoder is not None:
        return arch
    text = get_arch(config.get_text_config().model_type)
    return None if text is None else replace(arch, decoder=text.decoder)


def described(config: Any) -> str:
    """The model type, and that of the decoder inside where it is another's: `llava with llama`."""
    inner = config.get_text_config().model_type
    arch = get_arch(config.model_type)
    return f"{config.model_type} with {inner}" if arch is not None and arch.decoder is None else config.model_type

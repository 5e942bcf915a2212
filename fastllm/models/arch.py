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
# Vision towers that several architectures have: each is config.vision_config.model_type and the module of
# fastllm.models.towers that defines its CLASSES.
_TOWERS = ("clip_vision_model", "pixtral", "siglip_vision_model")


@dataclass(frozen=True)
class Arch:
    """One architecture.

    `model`, `decoder` and `vision` map each Hugging Face class to the subclass that its instances become: the model
    with its head and loss, the parts of its language decoder, and those of its vision tower. `decoder` is None for a
    model that is built around the decoder of any other architecture, as LLaVA is, and `vision` for one that takes any
    tower. A subclass adds forwards only: it keeps the name (transformers writes it into config.json and matches it in
    places) and has no `__init__`.
    """

    model_type: str
    model: Mapping[type, type]
    decoder: Mapping[type, type] | None
    layers: str = "model.layers"
    vision: Mapping[type, type] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        for original, fast in self.classes.items():
            if not issubclass(fast, original) or fast.__name__ != original.__name__ or "__init__" in vars(fast):
                raise TypeError(f"{fast} must subclass {original}, keep its name and define no __init__")

    @property
    def classes(self) -> dict[type, type]:
        return {**self.model, **(self.decoder or {}), **(self.vision or {})}


def supported_model_types() -> list[str]:
    return list(_MODEL_TYPES)


@functools.cache
def get_arch(model_type: str) -> Arch | None:
    """The record of `config.model_type`, or None for an architecture that has no fast classes."""
    if model_type not in _MODEL_TYPES:
        return None
    return importlib.import_module(f"fastllm.models.archs.{model_type}").ARCH


@functools.cache
def get_tower(model_type: str) -> Mapping[type, type]:
    """The fast classes of the vision tower of `config.vision_config.model_type`; none for one that is not known."""
    if model_type not in _TOWERS:
        return {}
    return importlib.import_module(f"fastllm.models.towers.{model_type}").CLASSES


def arch_of(config: Any) -> Arch | None:
    """The record of the model that `config` describes, with the decoder and the vision tower that it is built around;
    None where the model or that decoder has no fast classes."""
    arch = get_arch(config.model_type)
    if arch is not None and arch.decoder is None:
        text = get_arch(config.get_text_config().model_type)
        arch = None if text is None else replace(arch, decoder=text.decoder)
    if arch is not None and arch.vision is None:
        arch = replace(arch, vision=get_tower(config.vision_config.model_type))
    return arch


def described(config: Any) -> str:
    """The model type, and that of the decoder inside where it is another's: `llava with llama`."""
    inner = config.get_text_config().model_type
    arch = get_arch(config.model_type)
    return f"{config.model_type} with {inner}" if arch is not None and arch.decoder is None else config.model_type

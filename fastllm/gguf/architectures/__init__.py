"""The architectures that can be exported, one file a family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._errors import UnsupportedError, nearest
from .base import Architecture, Layout, ModelConfig, Target
from .gemma import GEMMA, GEMMA2, GEMMA3
from .llama import LLAMA
from .phi3 import PHI3
from .projectors import Projector, VisionConfig, normalization, projector_of, tell_sizes
from .qwen import QWEN2, QWEN2VL, QWEN3, QWEN3MOE, QWEN3VL

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA, QWEN2, QWEN2VL, QWEN3, QWEN3MOE, QWEN3VL, GEMMA, GEMMA2, GEMMA3, PHI3,
)  # fmt: skip
_BY_MODEL_TYPE = {model_type: entry for entry in ARCHITECTURES for model_type in entry.model_types}

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layout",
    "ModelConfig",
    "Projector",
    "Target",
    "VisionConfig",
    "architecture_of",
    "gguf_names",
    "normalization",
    "projector_of",
    "tell_sizes",
]


def architecture_of(raw_config: Mapping[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture of a `config.json` and the checked configuration.

    Raises `UnsupportedError` for a model type that can't be exported, or a setting that llama.cpp would get wrong.
    """
    model_type = raw_config.get("model_type")
    architecture = _BY_MODEL_TYPE.get(str(model_type))
    if architecture is None:
        raise UnsupportedError(
            f"model_type {model_type!r} can't be exported to GGUF {nearest(str(model_type), _BY_MODEL_TYPE)}".rstrip(),
            where="config.json",
            fix=f"export one of {', '.join(sorted(_BY_MODEL_TYPE))}, or save merged_16bit",
        )
    config = ModelConfig(raw_config)
    architecture.check(config)
    return architecture, config


def gguf_names(raw_config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Checkpoint tensor name -> the GGUF tensors that it becomes; several for a fused one."""
    architecture, config = architecture_of(raw_config)
    targets = architecture.layout(config).targets
    return {source: tuple(target.name for target in places) for source, places in targets.items()}

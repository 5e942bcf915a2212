"""fastllm: fast, small and exact fine-tuning of language models on the GPU you have.

Importing it imports nothing else: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> the module that defines it
_EXPORTS: dict[str, str] = {
    "AdamW8bit": "fastllm.models.optimizers",
    "FastLanguageModel": "fastllm.models.language",
    "FastModel": "fastllm.models.vision",
    "FastTrainer": "fastllm.trainer",
    "FastTrainingArguments": "fastllm.trainer",
    "FastVisionModel": "fastllm.models.vision",
    "PatchDPOTrainer": "fastllm.compat",
    "PatchFastRL": "fastllm.compat",
    "PatchKTOTrainer": "fastllm.compat",
    "UnslothTrainer": "fastllm.trainer",
    "UnslothTrainingArguments": "fastllm.trainer",
    "UnslothVisionDataCollator": "fastllm.vision_data",
    "unsloth_train": "fastllm.trainer",
    "is_bf16_supported": "fastllm._device",
    "is_bfloat16_supported": "fastllm._device",
}

if TYPE_CHECKING:
    from ._device import is_bf16_supported as is_bf16_supported
    from ._device import is_bfloat16_supported as is_bfloat16_supported
    from .compat import PatchDPOTrainer as PatchDPOTrainer
    from .compat import PatchFastRL as PatchFastRL
    from .compat import PatchKTOTrainer as PatchKTOTrainer
    from .models.language import FastLanguageModel as FastLanguageModel
    from .models.optimizers import AdamW8bit as AdamW8bit
    from .models.vision import FastModel as FastModel
    from .models.vision import FastVisionModel as FastVisionModel
    from .trainer import FastTrainer as FastTrainer
    from .trainer import FastTrainingArguments as FastTrainingArguments
    from .trainer import UnslothTrainer as UnslothTrainer
    from .trainer import UnslothTrainingArguments as UnslothTrainingArguments
    from .trainer import unsloth_train as unsloth_train
    from .vision_data import UnslothVisionDataCollator as UnslothVisionDataCollator

__all__ = ["__version__", *sorted(_EXPORTS)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    from ._errors import nearest

    raise AttributeError(f"module 'fastllm' has no attribute {name!r} {nearest(name, _EXPORTS)}".rstrip())


def __dir__() -> list[str]:
    return sorted(__all__)

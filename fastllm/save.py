"""Saving any transformers or PEFT model: the functions behind `model.save_pretrained_merged` and its siblings.

A model that fastllm loaded has them as methods; these take every other one, for example a `peft.PeftModel` that was
trained without fastllm.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ._errors import UnsupportedError
from .models.model_methods import ModelMethods
from .models.patch import unwrapped


def save_pretrained_merged(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    **options: Any,
) -> Path:
    """Save `model` with its active adapters merged; see `ModelMethods.save_pretrained_merged`."""
    return ModelMethods.save_pretrained_merged(_inner(model), save_directory, tokenizer, save_method, **options)


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    **options: Any,
) -> str:
    """Save `model` with its active adapters merged and upload it; see `ModelMethods.push_to_hub_merged`."""
    return ModelMethods.push_to_hub_merged(_inner(model), repo_id, tokenizer, save_method, **options)


def save_pretrained_gguf(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    quantization_method: Any = "fast_quantized",
    **options: Any,
) -> dict[str, Any]:
    """Save `model` with its active adapters merged as GGUF files; see `ModelMethods.save_pretrained_gguf`."""
    return ModelMethods.save_pretrained_gguf(_inner(model), save_directory, tokenizer, quantization_method, **options)


def push_to_hub_gguf(
    model: Any, repo_id: str, tokenizer: Any = None, quantization_method: Any = "fast_quantized", **options: Any
) -> str:
    """Save `model` as GGUF files and upload them; see `ModelMethods.push_to_hub_gguf`."""
    return ModelMethods.push_to_hub_gguf(_inner(model), repo_id, tokenizer, quantization_method, **options)


def _inner(model: Any) -> Any:
    """The transformers model under PEFT. A learned prompt is no change of any weight, so it can't be merged."""
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise UnsupportedError(
            f"{config.peft_type.value} trains a prompt, which can't be merged into weights",
            where="fastllm.save",
            fix="model.save_pretrained(folder)",
        )
    return unwrapped(model)

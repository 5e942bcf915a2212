"""Rotary positions: the keys and factor tensors of each scaling that llama.cpp knows.

Formulas: transformers' `modeling_rope_utils`, which they have to agree with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..._errors import ModelError, UnsupportedError
from ..container import Value
from .base import Layout, ModelConfig, finite


def rope_parameters(config: ModelConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary settings of one layer type, whether flat, by layer type, or in the older `rope_scaling`."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = dict(found.get(layer_type, found))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            parameters.setdefault(key, config.get(key))
    return parameters


def rotated_dim(config: ModelConfig) -> int:
    """How many of a head's dimensions are rotated."""
    fraction = finite("partial_rotary_factor", rope_parameters(config).get("partial_rotary_factor") or 1.0)
    return int(fraction * config.head_dim)


def rope_metadata(name: str, config: ModelConfig) -> dict[str, Value]:
    """Keys for the rotary settings of the full-attention layers. Raises `UnsupportedError` for an unknown scaling."""
    parameters = rope_parameters(config)
    keys: dict[str, Value] = {
        "dimension_count": rotated_dim(config),
        "freq_base": finite("rope_theta", parameters["rope_theta"]),
    }
    kind = parameters["rope_type"]
    if kind == "linear":
        keys |= {"scaling.type": "linear", "scaling.factor": finite("factor", parameters.get("factor"))}
    elif kind == "yarn":
        keys |= _yarn(config, parameters)
    elif kind in ("longrope", "su"):
        keys |= {
            "scaling.type": "longrope",
            "scaling.original_context_length": _original_context(config, parameters),
            "scaling.attn_factor": _longrope_attention_factor(config, parameters),
        }
    elif kind not in ("default", "mrope", "llama3"):  # llama3 is in the factor tensor alone
        raise UnsupportedError(f"llama.cpp has no rope_type {kind!r}", where="config.json")
    return {f"{name}.rope.{key}": value for key, value in keys.items()}


def add_rope_factors(layout: Layout, config: ModelConfig) -> None:
    """Tensors that divide the rotary frequencies one by one, for the scalings that have them."""
    parameters = rope_parameters(config)
    if parameters["rope_type"] == "llama3":
        layout.add_constant("rope_freqs.weight", _llama3_factors(config, parameters))
    if parameters["rope_type"] in ("longrope", "su"):
        for length in ("long", "short"):
            factors = torch.tensor(parameters[f"{length}_factor"], dtype=torch.float32)
            if factors.shape != (rotated_dim(config) // 2,):
                raise ModelError(
                    f"{length}_factor does not have {rotated_dim(config) // 2} values", where="config.json"
                )
            layout.add_constant(f"rope_factors_{length}.weight", factors)


def _original_context(config: ModelConfig, parameters: Mapping[str, Any]) -> int:
    original = parameters.get("original_max_position_embeddings") or config.count("max_position_embeddings")
    return int(finite("original_max_position_embeddings", original))


def _yarn(config: ModelConfig, parameters: Mapping[str, Any]) -> dict[str, Value]:
    """YaRN (arXiv 2309.00071). llama.cpp scales attention by 1 + 0.1 ln(factor) and rounds the ramp's ends."""
    factor = finite("factor", parameters.get("factor"))
    attention_factor = parameters.get("attention_factor")
    differs = attention_factor is not None and not math.isclose(
        attention_factor, 1 + 0.1 * math.log(factor), rel_tol=1e-3
    )
    if differs or parameters.get("mscale_all_dim") or parameters.get("truncate") is False:
        raise UnsupportedError("this YaRN scales attention in another way than llama.cpp's", where="config.json")
    keys: dict[str, Value] = {
        "scaling.type": "yarn",
        "scaling.factor": factor,
        "scaling.original_context_length": _original_context(config, parameters),
    }
    for name in ("beta_fast", "beta_slow"):
        if parameters.get(name) is not None:
            keys[f"scaling.yarn_{name}"] = finite(name, parameters[name])
    return keys


def _longrope_attention_factor(config: ModelConfig, parameters: Mapping[str, Any]) -> float:
    """LongRoPE (arXiv 2402.13753): sqrt(1 + ln(extension) / ln(original context))."""
    if parameters.get("attention_factor") is not None:
        return finite("attention_factor", parameters["attention_factor"])
    original = _original_context(config, parameters)
    extension = parameters.get("factor") or config.count("max_position_embeddings") / original
    return math.sqrt(1 + math.log(extension) / math.log(original)) if extension > 1 else 1.0


def _llama3_factors(config: ModelConfig, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    dim = rotated_dim(config)
    factor, low, high = (finite(key, parameters.get(key)) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _original_context(config, parameters)
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    wavelengths = 2 * math.pi * finite("rope_theta", parameters["rope_theta"]) ** exponents
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).float()

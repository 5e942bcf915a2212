"""Gemma 1, 2 and 3 (text).

transformers stores norm weights less one; llama.cpp multiplies by what it reads, so one is added.
"""

from __future__ import annotations

import math

from ..._errors import UnsupportedError
from ..container import Value
from .base import (
    QK_NORMS,
    Architecture,
    Layout,
    ModelConfig,
    add_attention,
    add_ends,
    add_mlp,
    add_norms,
    common_metadata,
    finite,
    plus_one,
)
from .rope import rope_metadata, rope_parameters

_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_AROUND = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def _check(config: ModelConfig) -> None:
    activation = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    gelu = ("gelu_pytorch_tanh", "gelu", "gelu_new")
    config.require(activation, gelu, "llama.cpp computes the tanh form of GELU", default=gelu[0])
    config.require("attention_bias", False, "llama.cpp has no attention bias there", default=False)
    config.require("tie_word_embeddings", True, "llama.cpp has no separate head there", default=True)


def _check_layers(config: ModelConfig, name: str, period: int) -> None:
    """Windows and attention scale are not in the file: llama.cpp knows them by the number of the layers."""
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(config.num_layers)]
    config.require("layer_types", expected, f"llama.cpp has full attention in each {period}th layer", default=expected)
    is_27b = config.num_layers == _LAYERS_OF_27B[name]
    scalar = config.width // config.num_heads if is_27b else config.head_dim
    if not math.isclose(config.number("query_pre_attn_scalar", scalar), scalar):
        raise UnsupportedError(
            f"query_pre_attn_scalar={config.get('query_pre_attn_scalar')}: llama.cpp scales attention by {scalar}",
            where=f"GGUF export of {config.model_type}",
        )


def _check_gemma2(config: ModelConfig) -> None:
    _check(config)
    _check_layers(config, "gemma2", period=2)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not config.get(key):
            raise UnsupportedError(f"{key} is off; llama.cpp always caps logits there", where="GGUF export of gemma2")


def _check_gemma3(config: ModelConfig) -> None:
    _check(config)
    _check_layers(config, "gemma3", period=6)
    config.require("attn_logit_softcapping", 0, "llama.cpp does not cap attention there", default=0)
    config.require("use_bidirectional_attention", False, "llama.cpp attends to the past there", default=False)


def _metadata(name: str, config: ModelConfig) -> dict[str, Value]:
    return common_metadata(name, config) | rope_metadata(name, config)


def _metadata_gemma2(config: ModelConfig) -> dict[str, Value]:
    return _metadata("gemma2", config) | {
        "gemma2.attention.sliding_window": config.count("sliding_window"),
        "gemma2.attn_logit_softcapping": config.number("attn_logit_softcapping"),
        "gemma2.final_logit_softcapping": config.number("final_logit_softcapping"),
    }


def _metadata_gemma3(config: ModelConfig) -> dict[str, Value]:
    local = rope_parameters(config, "sliding_attention").get("rope_theta")
    keys = _metadata("gemma3", config) | {
        "gemma3.attention.sliding_window": config.count("sliding_window"),
        "gemma3.rope.freq_base_swa": finite("rope_local_base_freq", config.get("rope_local_base_freq", local)),
    }
    if config.get("final_logit_softcapping"):
        keys["gemma3.final_logit_softcapping"] = config.number("final_logit_softcapping")
    return keys


def _layout(config: ModelConfig, norms: dict[str, str], has_qk_norm: bool = False) -> Layout:
    layout = Layout()
    add_ends(layout, config, tied=True, norm_change=plus_one)
    for layer in range(config.num_layers):
        add_norms(layout, layer, config.width, norms, plus_one)
        if has_qk_norm:
            add_norms(layout, layer, config.head_dim, QK_NORMS, plus_one)
        add_attention(layout, config, layer)
        add_mlp(layout, config, layer)
    return layout


GEMMA = Architecture(
    "gemma", ("gemma",), _check, lambda config: _metadata("gemma", config), lambda config: _layout(config, _NORMS)
)
GEMMA2 = Architecture(
    "gemma2", ("gemma2",), _check_gemma2, _metadata_gemma2, lambda config: _layout(config, _NORMS_AROUND)
)
GEMMA3 = Architecture(
    "gemma3",
    ("gemma3_text", "gemma3"),
    _check_gemma3,
    _metadata_gemma3,
    lambda config: _layout(config, _NORMS_AROUND, has_qk_norm=True),
)

"""Llama, Mistral and Mixtral: llama.cpp's `llama`.

Its rotary positions pair neighbours where transformers pairs halves, so the rows of query and key are reordered.
"""

from __future__ import annotations

import torch

from ..._notices import notice
from ..container import Value
from .base import (
    LLAMA_NORMS,
    Architecture,
    Change,
    Layout,
    ModelConfig,
    add_attention,
    add_ends,
    add_mlp,
    add_norms,
    common_metadata,
)
from .rope import add_rope_factors, rope_metadata


def interleave_halves(num_heads: int) -> Change:
    """Rows (head, half, i) to (head, i, half), of a weight or a bias."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return change


def _check(config: ModelConfig) -> None:
    config.require("hidden_act", ("silu", "swish"), "llama.cpp computes SiLU", default="silu")
    window = config.get("sliding_window")
    if window is not None and window < config.count("max_position_embeddings"):
        notice(f"fastllm: llama.cpp attends beyond the model's window of {window} tokens; keep num_ctx at or below it")


def _metadata(config: ModelConfig) -> dict[str, Value]:
    keys = common_metadata("llama", config) | rope_metadata("llama", config)
    keys["llama.vocab_size"] = config.count("vocab_size")
    if config.num_experts:
        keys["llama.expert_count"] = config.num_experts
        keys["llama.expert_used_count"] = config.count("num_experts_per_tok")
    return keys


def _layout(config: ModelConfig) -> Layout:
    layout = Layout()
    add_ends(layout, config, tied=False)
    add_rope_factors(layout, config)
    has_bias = bool(config.get("attention_bias", False))
    for layer in range(config.num_layers):
        add_norms(layout, layer, config.width, LLAMA_NORMS)
        add_attention(
            layout,
            config,
            layer,
            has_bias=has_bias,
            has_output_bias=has_bias,
            change_q=interleave_halves(config.num_heads),
            change_k=interleave_halves(config.num_kv_heads),
        )
        if config.num_experts:
            _add_moe(layout, config, layer)
        else:
            add_mlp(layout, config, layer, has_bias=bool(config.get("mlp_bias", False)))
    return layout


def _add_moe(layout: Layout, config: ModelConfig, layer: int) -> None:
    block, source = f"blk.{layer}", f"model.layers.{layer}"
    router = (config.num_experts, config.width)
    layout.add(f"{block}.ffn_gate_inp.weight", f"{source}.mlp.gate.weight", router)
    layout.add(f"{block}.ffn_gate_inp.weight", f"{source}.block_sparse_moe.gate.weight", router)
    layout.add_experts(
        block,
        f"{source}.mlp.experts",
        f"{source}.block_sparse_moe.experts",
        ("w1", "w2", "w3"),
        config.num_experts,
        config.width,
        config.count("intermediate_size"),
    )


LLAMA = Architecture("llama", ("llama", "mistral", "mixtral"), _check, _metadata, _layout)

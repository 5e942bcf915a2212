"""Phi 3, 3.5 and 4: fused projections stay fused."""

from __future__ import annotations

from ..._notices import notice
from ..container import Value
from .base import LLAMA_NORMS, Architecture, Layout, ModelConfig, add_ends, add_norms, common_metadata
from .rope import add_rope_factors, rope_metadata, rope_parameters


def _check(config: ModelConfig) -> None:
    config.require("hidden_act", ("silu", "swish"), "llama.cpp computes SiLU", default="silu")
    derived = config.width // config.num_heads
    config.require("head_dim", derived, "llama.cpp derives it from the width", default=derived)
    window = config.get("sliding_window")
    if window is not None and window < config.count("max_position_embeddings"):
        notice(f"fastllm: llama.cpp attends beyond the model's window of {window} tokens; keep num_ctx at or below it")


def _metadata(config: ModelConfig) -> dict[str, Value]:
    keys = common_metadata("phi3", config) | rope_metadata("phi3", config)
    original = rope_parameters(config).get("original_max_position_embeddings")
    keys["phi3.rope.scaling.original_context_length"] = int(original or config.count("max_position_embeddings"))
    # llama.cpp tells Phi 4, which has no window, by a window of 0
    keys["phi3.attention.sliding_window"] = int(config.get("sliding_window", 0))
    return keys


def _layout(config: ModelConfig) -> Layout:
    layout = Layout()
    add_ends(layout, config, tied=False)
    add_rope_factors(layout, config)
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.count("intermediate_size")
    for layer in range(config.num_layers):
        block, source = f"blk.{layer}", f"model.layers.{layer}"
        add_norms(layout, layer, config.width, LLAMA_NORMS)
        qkv_shape = (q_size + 2 * kv_size, config.width)
        layout.add_linear(f"{block}.attn_qkv", f"{source}.self_attn.qkv_proj", qkv_shape)
        layout.add_linear(f"{block}.attn_output", f"{source}.self_attn.o_proj", (config.width, q_size))
        layout.add_linear(f"{block}.ffn_up", f"{source}.mlp.gate_up_proj", (2 * inner, config.width))
        layout.add_linear(f"{block}.ffn_down", f"{source}.mlp.down_proj", (config.width, inner))
    return layout


PHI3 = Architecture("phi3", ("phi3",), _check, _metadata, _layout)

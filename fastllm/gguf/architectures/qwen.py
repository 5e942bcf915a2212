"""Qwen2 and 2.5, Qwen3, Qwen3 with experts, and the language models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from ..._errors import ModelError, UnsupportedError
from ..._notices import notice
from ..container import Value
from .base import (
    LLAMA_NORMS,
    QK_NORMS,
    Architecture,
    Layout,
    ModelConfig,
    add_attention,
    add_ends,
    add_mlp,
    add_norms,
    common_metadata,
)
from .rope import rope_metadata, rope_parameters


def _check(config: ModelConfig) -> None:
    config.require("hidden_act", ("silu", "swish"), "llama.cpp computes SiLU", default="silu")
    if config.get("use_sliding_window") and config.get("sliding_window"):
        notice(f"fastllm: llama.cpp attends beyond the model's window of {config.get('sliding_window')} tokens")


def _check_qwen2(config: ModelConfig) -> None:
    _check(config)
    config.require("head_dim", config.width // config.num_heads, "llama.cpp derives it from the width",
                   default=config.width // config.num_heads)  # fmt: skip


def _check_qwen3(config: ModelConfig) -> None:
    _check(config)
    config.require("attention_bias", False, "llama.cpp has no attention bias there", default=False)


def _check_qwen3moe(config: ModelConfig) -> None:
    _check_qwen3(config)
    config.require("norm_topk_prob", True, "llama.cpp normalises the chosen experts' weights", default=False)
    config.require("decoder_sparse_step", 1, "llama.cpp has experts in every layer", default=1)
    config.require("mlp_only_layers", [], "llama.cpp has experts in every layer", default=[])


def _check_mrope(config: ModelConfig, *, interleaved: bool) -> None:
    """Three positions a token: llama.cpp knows by the architecture how frequencies are shared among them."""
    parameters = rope_parameters(config)
    if bool(parameters.get("mrope_interleaved", interleaved)) != interleaved:
        raise UnsupportedError(
            f"mrope_interleaved={parameters['mrope_interleaved']}: llama.cpp has it the other way there",
            where=f"GGUF export of {config.model_type}",
        )
    sections = parameters.get("mrope_section")
    if not isinstance(sections, list | tuple) or len(sections) != 3:
        raise ModelError(f"mrope_section is {sections!r}, not three numbers", where="config.json")


def _check_qwen2vl(config: ModelConfig) -> None:
    _check_qwen2(config)
    _check_mrope(config, interleaved=False)


def _check_qwen3vl(config: ModelConfig) -> None:
    _check_qwen3(config)
    _check_mrope(config, interleaved=True)


def _metadata(name: str, config: ModelConfig) -> dict[str, Value]:
    return common_metadata(name, config) | rope_metadata(name, config)


def _metadata_mrope(name: str, config: ModelConfig) -> dict[str, Value]:
    sections = [int(size) for size in rope_parameters(config)["mrope_section"]]
    return _metadata(name, config) | {f"{name}.rope.dimension_sections": [*sections, 0]}


def _metadata_qwen3vl(config: ModelConfig) -> dict[str, Value]:
    vision = config.get("vision_config", {})
    return _metadata_mrope("qwen3vl", config) | {
        "qwen3vl.n_deepstack_layers": len(vision.get("deepstack_visual_indexes", ()))
    }


def _metadata_qwen3moe(config: ModelConfig) -> dict[str, Value]:
    return _metadata("qwen3moe", config) | {
        "qwen3moe.expert_count": config.num_experts,
        "qwen3moe.expert_used_count": config.count("num_experts_per_tok"),
        "qwen3moe.expert_feed_forward_length": config.count("moe_intermediate_size"),
    }


def _layout_qwen2(config: ModelConfig) -> Layout:
    layout = Layout()
    add_ends(layout, config, tied=False)
    for layer in range(config.num_layers):
        add_norms(layout, layer, config.width, LLAMA_NORMS)
        add_attention(layout, config, layer, has_bias=True)
        add_mlp(layout, config, layer)
    return layout


def _layout_qwen3(config: ModelConfig) -> Layout:
    layout = Layout()
    add_ends(layout, config, tied=False)
    for layer in range(config.num_layers):
        add_norms(layout, layer, config.width, LLAMA_NORMS)
        add_norms(layout, layer, config.head_dim, QK_NORMS)
        add_attention(layout, config, layer)
        if config.num_experts:
            _add_moe(layout, config, layer)
        else:
            add_mlp(layout, config, layer)
    return layout


def _add_moe(layout: Layout, config: ModelConfig, layer: int) -> None:
    block, source = f"blk.{layer}", f"model.layers.{layer}.mlp"
    layout.add(f"{block}.ffn_gate_inp.weight", f"{source}.gate.weight", (config.num_experts, config.width))
    layout.add_experts(
        block,
        f"{source}.experts",
        f"{source}.experts",
        ("gate_proj", "down_proj", "up_proj"),
        config.num_experts,
        config.width,
        config.count("moe_intermediate_size"),
    )


QWEN2 = Architecture("qwen2", ("qwen2",), _check_qwen2, lambda config: _metadata("qwen2", config), _layout_qwen2)
QWEN3 = Architecture("qwen3", ("qwen3",), _check_qwen3, lambda config: _metadata("qwen3", config), _layout_qwen3)
QWEN3MOE = Architecture("qwen3moe", ("qwen3_moe",), _check_qwen3moe, _metadata_qwen3moe, _layout_qwen3)
QWEN2VL = Architecture(
    "qwen2vl",
    ("qwen2_vl", "qwen2_5_vl"),
    _check_qwen2vl,
    lambda config: _metadata_mrope("qwen2vl", config),
    _layout_qwen2,
)
QWEN3VL = Architecture("qwen3vl", ("qwen3_vl",), _check_qwen3vl, _metadata_qwen3vl, _layout_qwen3)

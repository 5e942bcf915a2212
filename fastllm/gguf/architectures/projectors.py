"""Vision towers with their projectors: llama.cpp's `clip`, a file of its own beside the language model's.

`clip.projector_type` names the whole tower. What the file can't say is fixed in llama.cpp by that name: the rotary
positions of Qwen-VL, its merge of 2 by 2 patches, its windows of 112 pixels. Source: llama.cpp's tools/mtmd/clip.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..._errors import ModelError, UnsupportedError
from ..._notices import notice
from ..container import Value
from .base import Change, Layout, ModelConfig, finite, plus_one

_EPSILON = 1e-6  # of the norms of the Qwen-VL towers, in transformers' code
_IMAGE_TOKENS = (8, 4096)  # the fewest and most that llama.cpp gives an image of Qwen-VL
_GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new")


class VisionConfig(ModelConfig):
    """The vision part of a `config.json`, beside `text` and the settings of the whole model."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = dict(raw["vision_config"])
        self.whole, self.text = raw, ModelConfig(raw)

    @property
    def num_layers(self) -> int:
        return self.count("depth", self.get("num_hidden_layers"))

    @property
    def num_heads(self) -> int:
        return self.count("num_heads", self.get("num_attention_heads"))

    @property
    def width(self) -> int:
        return self.count("embed_dim", self.get("hidden_size"))


@dataclass(frozen=True, slots=True)
class Projector:
    """One of llama.cpp's projector types: how a vision configuration and its tensors become its keys and tensors.

    `check` raises `UnsupportedError` for settings that llama.cpp would ignore or get wrong. `keeps_size`: an image has
    as many tokens as its size asks for.
    """

    name: str
    model_type: str
    keeps_size: bool
    check: Callable[[VisionConfig], None]
    metadata: Callable[[VisionConfig], dict[str, Value]]
    layout: Callable[[VisionConfig], Layout]


def normalization(image_processor: Mapping[str, Any]) -> dict[str, Value]:
    """The keys that say how pixels are normalised. Raises `UnsupportedError` for a processor that does not do so as
    llama.cpp: divided by 255, less the mean, over the deviation."""
    for key in ("do_rescale", "do_normalize"):
        if image_processor.get(key) is False:
            raise UnsupportedError(f"{key}=False: llama.cpp always does", where="image processor")
    if abs(finite("rescale_factor", image_processor.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-3:
        raise UnsupportedError("rescale_factor is not 1 / 255, which llama.cpp takes", where="image processor")
    keys: dict[str, Value] = {}
    for key in ("image_mean", "image_std"):
        values = image_processor.get(key)
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ModelError(f"{key} is {values!r}, not one number for each of three colours", where="image processor")
        keys[f"clip.vision.{key}"] = [finite(key, value) for value in values]
    return keys


def tell_sizes(projector: Projector, config: VisionConfig, image_processor: Mapping[str, Any]) -> None:
    """Tell where llama.cpp, left alone, would show the model images of another size than the processor did."""
    if image_processor.get("do_pan_and_scan"):
        notice("fastllm: llama.cpp shows whole images, without the parts of do_pan_and_scan", once="gguf: pan and scan")
    size = image_processor.get("size") or {}
    least = size.get("shortest_edge") or image_processor.get("min_pixels")
    most = size.get("longest_edge") or image_processor.get("max_pixels")
    if not projector.keeps_size or least is None or most is None:
        return
    pixels_per_token = (2 * config.count("patch_size")) ** 2
    least, most = int(least) // pixels_per_token, int(most) // pixels_per_token
    if (least, most) != _IMAGE_TOKENS:
        notice(
            f"fastllm: the processor gives an image {least} to {most} tokens, llama.cpp {_IMAGE_TOKENS[0]} to"
            f" {_IMAGE_TOKENS[1]}: run it with --image-min-tokens {least} --image-max-tokens {most}",
            once=f"gguf: image tokens {least} {most}",
        )


def _common(config: VisionConfig, *, image_size: int, inner: int, epsilon: float) -> dict[str, Value]:
    return {
        "clip.has_vision_encoder": True,
        "clip.vision.image_size": image_size,
        "clip.vision.patch_size": config.count("patch_size"),
        "clip.vision.embedding_length": config.width,
        "clip.vision.feed_forward_length": inner,
        "clip.vision.block_count": config.num_layers,
        "clip.vision.attention.head_count": config.num_heads,
        "clip.vision.attention.layer_norm_epsilon": epsilon,
        "clip.vision.projection_dim": config.text.width,
    }


def _add_norm(layout: Layout, name: str, source: str, size: int, *, has_bias: bool = True) -> None:
    layout.add(f"{name}.weight", f"{source}.weight", (size,))
    if has_bias:
        layout.add(f"{name}.bias", f"{source}.bias", (size,))


# --- Qwen2-VL, Qwen2.5-VL, Qwen3-VL ----------------------------------------------------------------------------------


def _check_qwen(config: VisionConfig, activation: str) -> None:
    config.require("hidden_act", activation, f"llama.cpp computes {activation}", default=activation)
    config.require("spatial_merge_size", 2, "llama.cpp merges 2 by 2 patches", default=2)
    config.require("temporal_patch_size", 2, "llama.cpp has two kernels, one a frame", default=2)
    config.require("in_channels", 3, "llama.cpp reads three colours", default=3)
    if config.width // config.num_heads % 4:
        raise UnsupportedError(
            f"heads of {config.width // config.num_heads} dimensions, which are not rotated in four equal parts",
            where=f"GGUF export of {config.model_type}",
        )


def _check_qwen2(config: VisionConfig) -> None:
    _check_qwen(config, "quick_gelu")


def _check_qwen3(config: VisionConfig) -> None:
    _check_qwen(config, "gelu_pytorch_tanh")


def _check_qwen2_5(config: VisionConfig) -> None:
    _check_qwen(config, "silu")
    config.require("window_size", 112, "llama.cpp's windows have 112 pixels", default=112)
    period = _window_period(config)
    expected = list(range(period - 1, config.num_layers, period))
    if list(config.get("fullatt_block_indexes", ())) != expected:
        raise UnsupportedError(
            f"fullatt_block_indexes={config.get('fullatt_block_indexes')!r}: llama.cpp has full attention in one layer"
            f" of {period}, here {expected}",
            where=f"GGUF export of {config.model_type}",
        )


def _window_period(config: VisionConfig) -> int:
    """One layer in so many attends beyond its window."""
    indexes = config.get("fullatt_block_indexes") or [config.num_layers]
    return int(indexes[0]) + 1


def _metadata_qwen(config: VisionConfig, inner: int) -> dict[str, Value]:
    # These towers take images of any size; 560 is what llama.cpp's own files say.
    return _common(config, image_size=560, inner=inner, epsilon=_EPSILON)


def _metadata_qwen2(config: VisionConfig) -> dict[str, Value]:
    return _metadata_qwen(config, _qwen2_inner(config))


def _metadata_qwen2_5(config: VisionConfig) -> dict[str, Value]:
    return _metadata_qwen(config, config.count("intermediate_size")) | {
        "clip.use_silu": True,
        "clip.vision.n_wa_pattern": _window_period(config),
    }


def _metadata_qwen3(config: VisionConfig) -> dict[str, Value]:
    keys = _common(
        config,
        image_size=_position_side(config) * config.count("patch_size"),
        inner=config.count("intermediate_size"),
        epsilon=_EPSILON,
    )
    stacked = [layer in config.get("deepstack_visual_indexes", ()) for layer in range(config.num_layers)]
    return keys | {
        "clip.use_gelu": True,
        "clip.vision.spatial_merge_size": 2,
        "clip.vision.is_deepstack_layers": stacked,
    }


def _qwen2_inner(config: VisionConfig) -> int:
    return int(config.width * config.number("mlp_ratio", 4))


def _position_side(config: VisionConfig) -> int:
    """Rows and columns of the table of positions. Raises `ModelError` where it is not a square."""
    positions = config.count("num_position_embeddings", 2304)
    side = round(positions**0.5)
    if side * side != positions:
        raise ModelError(f"num_position_embeddings is {positions}, not a square", where="config.json")
    return side


def _layout_qwen2(config: VisionConfig) -> Layout:
    layout, inner = Layout(), _qwen2_inner(config)
    _add_patches(layout, config)
    for layer in range(config.num_layers):
        block, source = f"v.blk.{layer}", f"visual.blocks.{layer}"
        _add_norm(layout, f"{block}.ln1", f"{source}.norm1", config.width)
        _add_norm(layout, f"{block}.ln2", f"{source}.norm2", config.width)
        _add_attention(layout, config, layer)
        layout.add_linear(f"{block}.ffn_up", f"{source}.mlp.fc1", (inner, config.width), has_bias=True)
        layout.add_linear(f"{block}.ffn_down", f"{source}.mlp.fc2", (config.width, inner), has_bias=True)
    _add_norm(layout, "v.post_ln", "visual.merger.ln_q", config.width)
    _add_merger(layout, config, ("mm.0", "mm.2"), ("visual.merger.mlp.0", "visual.merger.mlp.2"))
    return layout


def _layout_qwen2_5(config: VisionConfig) -> Layout:
    layout, inner = Layout(), config.count("intermediate_size")
    _add_patches(layout, config)
    for layer in range(config.num_layers):
        block, source = f"v.blk.{layer}", f"visual.blocks.{layer}"
        _add_norm(layout, f"{block}.ln1", f"{source}.norm1", config.width, has_bias=False)
        _add_norm(layout, f"{block}.ln2", f"{source}.norm2", config.width, has_bias=False)
        _add_attention(layout, config, layer)
        for name in ("gate", "up", "down"):
            shape = (config.width, inner) if name == "down" else (inner, config.width)
            layout.add_linear(f"{block}.ffn_{name}", f"{source}.mlp.{name}_proj", shape, has_bias=True)
    _add_norm(layout, "v.post_ln", "visual.merger.ln_q", config.width, has_bias=False)
    _add_merger(layout, config, ("mm.0", "mm.2"), ("visual.merger.mlp.0", "visual.merger.mlp.2"))
    return layout


def _layout_qwen3(config: VisionConfig) -> Layout:
    layout, inner, width = Layout(), config.count("intermediate_size"), config.width
    _add_patches(layout, config)
    layout.add("v.patch_embd.bias", "visual.patch_embed.proj.bias", (width,))
    layout.add("v.position_embd.weight", "visual.pos_embed.weight", (_position_side(config) ** 2, width))
    for layer in range(config.num_layers):
        block, source = f"v.blk.{layer}", f"visual.blocks.{layer}"
        _add_norm(layout, f"{block}.ln1", f"{source}.norm1", width)
        _add_norm(layout, f"{block}.ln2", f"{source}.norm2", width)
        layout.add_linear(f"{block}.attn_qkv", f"{source}.attn.qkv", (3 * width, width), has_bias=True)
        layout.add_linear(f"{block}.attn_out", f"{source}.attn.proj", (width, width), has_bias=True)
        layout.add_linear(f"{block}.ffn_up", f"{source}.mlp.linear_fc1", (inner, width), has_bias=True)
        layout.add_linear(f"{block}.ffn_down", f"{source}.mlp.linear_fc2", (width, inner), has_bias=True)
    for i, layer in enumerate(config.get("deepstack_visual_indexes", ())):
        name, source = f"v.deepstack.{layer}", f"visual.deepstack_merger_list.{i}"
        _add_norm(layout, f"{name}.norm", f"{source}.norm", 4 * width)
        _add_merger(layout, config, (f"{name}.fc1", f"{name}.fc2"), (f"{source}.linear_fc1", f"{source}.linear_fc2"))
    _add_norm(layout, "v.post_ln", "visual.merger.norm", width)
    _add_merger(layout, config, ("mm.0", "mm.2"), ("visual.merger.linear_fc1", "visual.merger.linear_fc2"))
    return layout


def _add_patches(layout: Layout, config: VisionConfig) -> None:
    """The kernel over two frames becomes two kernels; of an image, both see the same pixels."""
    size, source = config.count("patch_size"), "visual.patch_embed.proj.weight"
    shape = (config.width, 3, size, size)
    layout.add("v.patch_embd.weight", source, shape, lambda tensor: tensor[:, :, 0])
    layout.add("v.patch_embd.weight.1", source, shape, lambda tensor: tensor[:, :, 1])


def _add_attention(layout: Layout, config: VisionConfig, layer: int) -> None:
    """Query, key and value, which are joined in the checkpoint, and the output projection."""
    block, source, width = f"v.blk.{layer}", f"visual.blocks.{layer}.attn", config.width
    for i, name in enumerate(("q", "k", "v")):
        rows = _rows(i * width, (i + 1) * width)
        layout.add_linear(f"{block}.attn_{name}", f"{source}.qkv", (width, width), has_bias=True, change=rows)
    layout.add_linear(f"{block}.attn_out", f"{source}.proj", (width, width), has_bias=True)


def _rows(start: int, stop: int) -> Change:
    return lambda tensor: tensor[start:stop]


def _add_merger(layout: Layout, config: VisionConfig, names: tuple[str, str], sources: tuple[str, str]) -> None:
    """Two linear layers from four patches to one token of the language model."""
    joined = 4 * config.width
    layout.add_linear(names[0], sources[0], (joined, joined), has_bias=True)
    layout.add_linear(names[1], sources[1], (config.text.width, joined), has_bias=True)


# --- Gemma 3 ---------------------------------------------------------------------------------------------------------


def _check_gemma3(config: VisionConfig) -> None:
    config.require("model_type", "siglip_vision_model", "llama.cpp has SigLIP there", default="siglip_vision_model")
    config.require("hidden_act", _GELU, "llama.cpp computes the tanh form of GELU", default=_GELU[0])
    config.require("num_channels", 3, "llama.cpp reads three colours", default=3)
    config.require("vision_use_head", False, "llama.cpp has no pooling head there", default=False)
    side, tokens = _patches_per_side(config), _tokens_per_side(config)
    if side % tokens:
        raise UnsupportedError(
            f"{side} patches a side are not pooled to {tokens}", where=f"GGUF export of {config.model_type}"
        )


def _patches_per_side(config: VisionConfig) -> int:
    return config.count("image_size") // config.count("patch_size")


def _tokens_per_side(config: VisionConfig) -> int:
    return round(ModelConfig(config.whole).count("mm_tokens_per_image", 256) ** 0.5)


def _metadata_gemma3(config: VisionConfig) -> dict[str, Value]:
    keys = _common(
        config,
        image_size=config.count("image_size"),
        inner=config.count("intermediate_size"),
        epsilon=config.number("layer_norm_eps", 1e-6),
    )
    return keys | {
        "clip.use_gelu": True,
        "clip.vision.projector.scale_factor": _patches_per_side(config) // _tokens_per_side(config),
    }


def _layout_gemma3(config: VisionConfig) -> Layout:
    layout, width, inner = Layout(), config.width, config.count("intermediate_size")
    size, tower = config.count("patch_size"), "vision_tower"
    layout.add("v.patch_embd.weight", f"{tower}.embeddings.patch_embedding.weight", (width, 3, size, size))
    layout.add("v.patch_embd.bias", f"{tower}.embeddings.patch_embedding.bias", (width,))
    positions = (_patches_per_side(config) ** 2, width)
    layout.add("v.position_embd.weight", f"{tower}.embeddings.position_embedding.weight", positions)
    for layer in range(config.num_layers):
        block, source = f"v.blk.{layer}", f"{tower}.encoder.layers.{layer}"
        _add_norm(layout, f"{block}.ln1", f"{source}.layer_norm1", width)
        _add_norm(layout, f"{block}.ln2", f"{source}.layer_norm2", width)
        for name, projection in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj")):
            target = f"{source}.self_attn.{projection}"
            layout.add_linear(f"{block}.attn_{name}", target, (width, width), has_bias=True)
        layout.add_linear(f"{block}.ffn_up", f"{source}.mlp.fc1", (inner, width), has_bias=True)
        layout.add_linear(f"{block}.ffn_down", f"{source}.mlp.fc2", (width, inner), has_bias=True)
    _add_norm(layout, "v.post_ln", f"{tower}.post_layernorm", width)
    projector = "multi_modal_projector"
    # Stored as [in, out], which is how llama.cpp reads it.
    layout.add("mm.input_projection.weight", f"{projector}.mm_input_projection_weight", (width, config.text.width))
    layout.add("mm.soft_emb_norm.weight", f"{projector}.mm_soft_emb_norm.weight", (width,), plus_one)
    return layout


PROJECTORS = (
    Projector("qwen2vl_merger", "qwen2_vl", True, _check_qwen2, _metadata_qwen2, _layout_qwen2),
    Projector("qwen2.5vl_merger", "qwen2_5_vl", True, _check_qwen2_5, _metadata_qwen2_5, _layout_qwen2_5),
    Projector("qwen3vl_merger", "qwen3_vl", True, _check_qwen3, _metadata_qwen3, _layout_qwen3),
    Projector("gemma3", "gemma3", False, _check_gemma3, _metadata_gemma3, _layout_gemma3),
)
_BY_MODEL_TYPE = {projector.model_type: projector for projector in PROJECTORS}


def projector_of(raw_config: Mapping[str, Any]) -> tuple[Projector, VisionConfig] | None:
    """The projector of a `config.json` with a vision part and the checked configuration; None for a text model.

    Raises `UnsupportedError` for a tower that can't be exported, or a setting that llama.cpp would get wrong.
    """
    if not isinstance(raw_config.get("vision_config"), Mapping):
        return None
    model_type = str(raw_config.get("model_type"))
    projector = _BY_MODEL_TYPE.get(model_type)
    if projector is None:
        raise UnsupportedError(
            f"the vision tower of {model_type!r} can't be exported to GGUF",
            where="config.json",
            fix=f"export one of {', '.join(_BY_MODEL_TYPE)}, or save merged_16bit",
        )
    config = VisionConfig(raw_config)
    projector.check(config)
    return projector, config

"""What an architecture has to say about itself, and the tools to say it in few lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ..._errors import ModelError, UnsupportedError
from ..container import Value
from ..recipes import ModelShape

Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
_LARGEST_COUNT = 2**24
_MOST_LAYERS = 10_000


class ModelConfig:
    """A `config.json`, or the text part of one, whose values are checked as they are read."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        text = raw.get("text_config")
        self.raw = dict(raw)
        if isinstance(text, Mapping):
            tied = [part.get("tie_word_embeddings") for part in (raw, text)]
            self.raw |= text
            if True in tied:  # transformers ties them where either part says so
                self.raw["tie_word_embeddings"] = True

    def get(self, key: str, default: Any = None) -> Any:
        """The value, and `default` where it is absent or null."""
        value = self.raw.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer. Raises `ModelError` where it is absent without a default, or absurd."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_COUNT:
            raise ModelError(f"{key} is {value!r}, not a positive number of reasonable size", where="config.json")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return finite(key, self.get(key, default))

    @property
    def model_type(self) -> str:
        return str(self.get("model_type", ""))

    @property
    def num_layers(self) -> int:
        layers = self.count("num_hidden_layers")
        if layers > _MOST_LAYERS:
            raise ModelError(f"num_hidden_layers is {layers}", where="config.json")
        return layers

    @property
    def width(self) -> int:
        return self.count("hidden_size")

    @property
    def num_heads(self) -> int:
        return self.count("num_attention_heads")

    @property
    def num_kv_heads(self) -> int:
        return self.count("num_key_value_heads", self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.count("head_dim", self.width // self.num_heads)

    @property
    def num_experts(self) -> int:
        """0 for a model without experts."""
        key = next((key for key in ("num_local_experts", "num_experts") if self.get(key)), None)
        return 0 if key is None else self.count(key)

    def require(self, key: str, expected: Any, reason: str, default: Any = None) -> None:
        """Raise `UnsupportedError` unless the value of `key` is `expected` (or one of a tuple of them)."""
        value = self.get(key, default)
        if value != expected and not (isinstance(expected, tuple) and value in expected):
            raise UnsupportedError(
                f"{key}={value!r}: {reason}",
                where=f"GGUF export of {self.model_type}",
                fix="save merged_16bit and serve that with transformers or vLLM",
            )


def finite(key: str, value: Any) -> float:
    """`value` as a finite float. Raises `ModelError` that names `key`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"{key} is {value!r}, not a number", where="config.json")
    return float(value)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor, or a part of it, goes: `change(tensor)` is GGUF tensor `name`, or its `expert`."""

    name: str
    change: Change
    expert: int | None = None


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def plus_one(tensor: torch.Tensor) -> torch.Tensor:
    """For norms that transformers stores less one."""
    return tensor.float() + 1


@dataclass(slots=True)
class Layout:
    """The tensors of a GGUF file and where they come from.

    `shapes` by GGUF name, in the order of the file; `targets` by checkpoint name; `constants` by GGUF name are made
    from the configuration alone. A tensor that checkpoints spell in two ways has targets under both.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    targets: dict[str, list[Target]] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, source: str, shape: tuple[int, ...], change: Change = unchanged) -> None:
        """GGUF tensor `name` of `shape` is `change` of checkpoint tensor `source`."""
        self.shapes[name] = shape
        self.targets.setdefault(source, []).append(Target(name, change))

    def add_constant(self, name: str, tensor: torch.Tensor) -> None:
        self.shapes[name] = tuple(tensor.shape)
        self.constants[name] = tensor

    def add_linear(
        self, name: str, source: str, shape: tuple[int, int], *, has_bias: bool = False, change: Change = unchanged
    ) -> None:
        self.add(f"{name}.weight", f"{source}.weight", shape, change)
        if has_bias:
            self.add(f"{name}.bias", f"{source}.bias", shape[:1], change)

    def add_experts(
        self, block: str, fused: str, single: str, names: tuple[str, str, str], num_experts: int, width: int, inner: int
    ) -> None:
        """Expert weights of one layer, [E, out, in].

        They come fused, `<fused>.gate_up_proj` [E, 2 F, D] and `<fused>.down_proj` [E, D, F], as in a live model, or
        one by one, `<single>.<expert>.<name>.weight` with `names` of gate, down and up, as in a checkpoint.
        """
        kinds = dict(zip(("gate", "down", "up"), names, strict=True))
        for kind in kinds:
            shape = (num_experts, width, inner) if kind == "down" else (num_experts, inner, width)
            self.shapes[f"{block}.ffn_{kind}_exps.weight"] = shape
        for expert in range(num_experts):
            for kind, name in kinds.items():
                target = Target(f"{block}.ffn_{kind}_exps.weight", unchanged, expert)
                self.targets[f"{single}.{expert}.{name}.weight"] = [target]
        self.targets[f"{fused}.gate_up_proj"] = [
            Target(f"{block}.ffn_gate_exps.weight", lambda tensor: tensor[:, :inner]),
            Target(f"{block}.ffn_up_exps.weight", lambda tensor: tensor[:, inner:]),
        ]
        self.targets[f"{fused}.down_proj"] = [Target(f"{block}.ffn_down_exps.weight", unchanged)]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of llama.cpp's architectures: how a transformers configuration and its tensors become its keys and tensors.

    `check` raises `UnsupportedError` for settings that llama.cpp would ignore or get wrong.
    """

    name: str
    model_types: tuple[str, ...]
    check: Callable[[ModelConfig], None]
    metadata: Callable[[ModelConfig], dict[str, Value]]
    layout: Callable[[ModelConfig], Layout]

    def shape(self, config: ModelConfig) -> ModelShape:
        return ModelShape(self.name, config.num_layers, config.num_heads, config.num_kv_heads, config.num_experts)


def common_metadata(name: str, config: ModelConfig) -> dict[str, Value]:
    """The keys that every architecture has."""
    keys: dict[str, Value] = {
        "block_count": config.num_layers,
        "context_length": config.count("max_position_embeddings"),
        "embedding_length": config.width,
        "feed_forward_length": config.count("intermediate_size"),
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
    }
    return {f"{name}.{key}": value for key, value in keys.items()}


def add_ends(layout: Layout, config: ModelConfig, *, tied: bool, norm_change: Change = unchanged) -> None:
    """Embedding, final norm and, where it is not the embedding, the head."""
    rows = (config.count("vocab_size"), config.width)
    layout.add("token_embd.weight", "model.embed_tokens.weight", rows)
    layout.add("output_norm.weight", "model.norm.weight", (config.width,), norm_change)
    if not config.get("tie_word_embeddings", tied):
        layout.add("output.weight", "lm_head.weight", rows)


def add_attention(
    layout: Layout,
    config: ModelConfig,
    layer: int,
    *,
    has_bias: bool = False,
    has_output_bias: bool = False,
    change_q: Change = unchanged,
    change_k: Change = unchanged,
) -> None:
    """Separate query, key, value and output projections of one layer."""
    block, source = f"blk.{layer}", f"model.layers.{layer}.self_attn"
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q_shape, kv_shape = (q_size, config.width), (kv_size, config.width)
    layout.add_linear(f"{block}.attn_q", f"{source}.q_proj", q_shape, has_bias=has_bias, change=change_q)
    layout.add_linear(f"{block}.attn_k", f"{source}.k_proj", kv_shape, has_bias=has_bias, change=change_k)
    layout.add_linear(f"{block}.attn_v", f"{source}.v_proj", kv_shape, has_bias=has_bias)
    o_shape = (config.width, q_size)
    layout.add_linear(f"{block}.attn_output", f"{source}.o_proj", o_shape, has_bias=has_output_bias)


def add_mlp(layout: Layout, config: ModelConfig, layer: int, *, has_bias: bool = False) -> None:
    """Gated MLP of one layer."""
    inner = config.count("intermediate_size")
    for name in ("gate", "up", "down"):
        shape = (config.width, inner) if name == "down" else (inner, config.width)
        source = f"model.layers.{layer}.mlp.{name}_proj"
        layout.add_linear(f"blk.{layer}.ffn_{name}", source, shape, has_bias=has_bias)


def add_norms(layout: Layout, layer: int, size: int, norms: dict[str, str], change: Change = unchanged) -> None:
    """Norms of one layer: GGUF name -> name in the checkpoint's layer."""
    for name, source in norms.items():
        layout.add(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{source}.weight", (size,), change)


LLAMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

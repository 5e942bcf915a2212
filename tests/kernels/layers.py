"""Small decoder layers, as tensors for the kernels and as Hugging Face models with PEFT run them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastllm.kernels.attention import AttentionCase
from fastllm.kernels.decoder_activations import RowsAway
from fastllm.kernels.layer_definition import DecoderLayer, Keep, LayerCall, Norm
from fastllm.kernels.lora import Projection, ProjectionGroup, dropout_masks

from . import eager
from .parity import Setting, Tensors
from .test_rope import angles

EPS = 1e-5
GROUPS = {"qkv": ("q", "k", "v"), "output": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
MERGED_GROUPS = {"qkv": ("qkv",), "output": ("o",), "gate_up": ("gate_up",), "down": ("down",)}
PARTS = ("weight", "bias", "lora_a", "lora_b")


@dataclass(frozen=True)
class Spec:
    """A layer and its batch. `weights` is "dense", "trained" or "nf4"; LoRA ranks are 5, 6 and 7 inside a group."""

    batch: int = 2
    length: int = 7
    width: int = 64
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16
    mlp_width: int = 128
    weights: str = "nf4"
    has_lora: bool = True
    has_bias: bool = False
    has_head_norms: bool = False
    has_out_norms: bool = False
    is_merged: bool = False
    trains_norms: bool = False
    offset: float = 0.0
    activation: str = "silu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mask: str = "causal"
    autocast: bool = False
    keep: Keep = Keep.ALL

    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each projection."""
        inner, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        if self.is_merged:
            return {
                "qkv": (inner + 2 * keys, self.width), "o": (self.width, inner),
                "gate_up": (2 * self.mlp_width, self.width), "down": (self.width, self.mlp_width),
            }  # fmt: skip
        return {
            "q": (inner, self.width), "k": (keys, self.width), "v": (keys, self.width), "o": (self.width, inner),
            "gate": (self.mlp_width, self.width), "up": (self.mlp_width, self.width),
            "down": (self.width, self.mlp_width),
        }  # fmt: skip

    def groups(self) -> dict[str, tuple[str, ...]]:
        return MERGED_GROUPS if self.is_merged else GROUPS

    def norms(self) -> dict[str, int]:
        heads = {"query_norm": self.head_dim, "key_norm": self.head_dim} if self.has_head_norms else {}
        outputs = {"attention_out_norm": self.width, "mlp_out_norm": self.width} if self.has_out_norms else {}
        return {"input_norm": self.width, "post_norm": self.width, **heads, **outputs}


def parameters_of(setting: Setting, spec: Spec) -> dict[str, torch.Tensor]:
    dtype = torch.float32 if spec.autocast else None
    tensors = {}
    for name, size in spec.norms().items():
        tensors[name] = setting.randn(size, scale=0.2, dtype=dtype) + (1 - spec.offset)
    for i, (name, (rows, columns)) in enumerate(spec.shapes().items()):
        tensors[f"{name}_weight"] = setting.randn(rows, columns, scale=columns**-0.5, dtype=dtype)
        if spec.has_bias:
            tensors[f"{name}_bias"] = setting.randn(rows, scale=0.3, dtype=dtype)
        if spec.has_lora:
            rank = 5 + i % 3
            tensors[f"{name}_lora_a"] = setting.randn(rank, columns, scale=columns**-0.5, dtype=dtype)
            tensors[f"{name}_lora_b"] = setting.randn(rows, rank, scale=0.3 * rank**-0.5, dtype=dtype)
    return tensors


def group_of(spec: Spec, tensors: Mapping, names: tuple[str, ...]) -> ProjectionGroup:
    projections = [
        Projection(*(tensors.get(f"{name}_{part}") for part in PARTS), scaling=0.5, dropout=spec.dropout)
        for name in names
    ]
    return ProjectionGroup(projections)


def layer_of(spec: Spec, tensors: Mapping) -> DecoderLayer:
    norms = {name: Norm(tensors[name], EPS, spec.offset) for name in spec.norms()}
    groups = {group: group_of(spec, tensors, names) for group, names in spec.groups().items()}
    return DecoderLayer(**norms, **groups, activation=spec.activation, head_dim=spec.head_dim)


def to_host(tensors: Sequence[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
    """Offloads the way a memory planner does, without its streams."""
    copies = [(tensor.device, tensor.detach().to("cpu", copy=True).contiguous()) for tensor in tensors]
    return [functools.partial(copy.to, device, copy=True) for device, copy in copies]


def rows_to_host(count: int) -> RowsAway:
    """Takes rows of gate and up's output away; they are back when somebody waited for them, and not before."""

    class Away:
        def __init__(self, matrix: torch.Tensor, count: int) -> None:
            self.kept, self.buffer = matrix[:count].detach().clone(), torch.full_like(matrix, torch.nan)

        def start(self) -> torch.Tensor:
            return self.buffer

        def arrive(self) -> None:
            self.buffer[: len(self.kept)] = self.kept

    return RowsAway(count, Away)


def call_of(setting: Setting, spec: Spec, **changes) -> LayerCall:
    cos, sin = angles(setting, spec.length, spec.rotary_dim)
    options = {
        "cos": cos.to(setting.dtype), "sin": sin.to(setting.dtype), "keep": spec.keep, "offload": to_host,
        "attention": AttentionCase(spec.head_dim**-0.5, mask_of(setting, spec), spec.attention_dropout),
    }  # fmt: skip
    return LayerCall(**{**options, **changes})


def mask_of(setting: Setting, spec: Spec) -> torch.Tensor | None:
    """Causal, and blind for the first two positions of the first row of the batch: padding on the left."""
    if spec.mask == "causal":
        return None
    seen = torch.ones(spec.batch, 1, spec.length, spec.length, dtype=torch.bool).tril()
    seen[0, :, 2:, :2] = False
    seen = seen.to(setting.device)
    return seen if spec.mask == "bool" else torch.zeros_like(seen, dtype=setting.dtype).masked_fill(~seen, -torch.inf)


def masks_of(spec: Spec, tensors: Tensors) -> dict[str, torch.Tensor | None]:
    """The dropout masks of each projection, in the order in which the layer draws them."""
    rows = spec.batch * spec.length
    found = {}
    for names in spec.groups().values():
        group = group_of(spec, tensors, names)
        like = torch.empty(rows, group.in_features, device=tensors["input_norm"].device)
        found |= dict(zip(names, dropout_masks(group, like), strict=True))
    return found


def eager_layer(
    x: torch.Tensor, spec: Spec, tensors: Tensors, masks: Mapping, call: LayerCall, *, autocast: bool = False
) -> torch.Tensor:
    """The layer as a Hugging Face model with PEFT runs it."""

    def norm(value: torch.Tensor, name: str) -> torch.Tensor:
        return eager.rms_norm(value, tensors[name], EPS, offset=spec.offset)

    def linear(value: torch.Tensor, name: str) -> torch.Tensor:
        mask = None if masks[name] is None else masks[name].view(*value.shape)
        parts = (tensors.get(f"{name}_{part}") for part in PARTS)
        return eager.lora_linear(value, *parts, scaling=0.5, mask=mask, dropout=spec.dropout)

    def joined(value: torch.Tensor, group: str) -> torch.Tensor:
        return torch.cat([linear(value, name) for name in spec.groups()[group]], dim=-1)

    heads = joined(norm(x, "input_norm"), "qkv").unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
    q, k, v = heads.split([spec.heads, spec.key_heads, spec.key_heads], dim=1)
    if spec.has_head_norms:
        q, k = norm(q, "query_norm"), norm(k, "key_norm")
    q, k = eager.rope(q, k, call.cos, call.sin)
    attend = call.attention.function or functools.partial(
        eager.attention, scaling=call.attention.scaling, mask=call.attention.mask
    )
    out = linear(attend(q, k, v).transpose(1, 2).flatten(2), "o")
    middle = x + (norm(out, "attention_out_norm") if spec.has_out_norms else out)
    gate, up = joined(norm(middle, "post_norm"), "gate_up").chunk(2, dim=-1)
    out = linear(eager.glu(gate, up, spec.activation), "down")
    return middle + (norm(out, "mlp_out_norm") if spec.has_out_norms else out)

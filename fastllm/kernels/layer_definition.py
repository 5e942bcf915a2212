"""What a decoder layer is: its tensors, what differs from call to call, and the definition of what it computes.

Source of the layer: `decoder_layer.py`, which runs it as one autograd node.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .attention import AttentionCase, attention_reference, choose_backend
from .decoder_activations import Offload, RowsAway
from .glu import glu_reference
from .gradient_room import GradientRoom
from .kept_weights import KeptWeights
from .lora import ProjectionGroup, project_reference
from .rms_norm import rms_norm_reference
from .rope import rope_reference

# In the order of their weights among a layer's parameters.
NORMS = ("input_norm", "query_norm", "key_norm", "attention_out_norm", "post_norm", "mlp_out_norm")


class Keep(enum.Enum):
    """What a layer holds between its forward and its backward."""

    ALL = "keep"  # every activation that the backward reads
    INPUT = "recompute"  # its input only; the rest is computed again
    OFFLOADED_INPUT = "offload"  # its input only, in host memory
    OFFLOADED_ATTENTION = "offload with attention"  # everything up to its second half, in host memory

    @property
    def is_offloaded(self) -> bool:
        return self in (Keep.OFFLOADED_INPUT, Keep.OFFLOADED_ATTENTION)


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """An RMSNorm's weight [D] and constants."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """One layer as tensors and numbers. `query_norm` and `key_norm` act on each head; `attention_out_norm` and
    `mlp_out_norm` on what is added to the residual stream."""

    input_norm: Norm
    qkv: ProjectionGroup
    output: ProjectionGroup
    post_norm: Norm
    gate_up: ProjectionGroup
    down: ProjectionGroup
    activation: str
    head_dim: int
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None

    @property
    def qkv_columns(self) -> tuple[slice, slice, slice]:
        """Where q, k and v stand in the joined output, of three matrices or of one (Phi-3)."""
        queries, keys, _ = qkv_widths(self.qkv, self.output)
        return slice(0, queries), slice(queries, queries + keys), slice(queries + keys, queries + 2 * keys)

    @property
    def gate_up_columns(self) -> tuple[slice, slice]:
        width = self.down.in_features
        return slice(0, width), slice(width, 2 * width)

    def split_heads(
        self, qkv: torch.Tensor, batch: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Joined rows as q, k, v [B, heads, S, head_dim], views."""
        q, k, v = (
            qkv[:, columns].unflatten(-1, (-1, self.head_dim)).unflatten(0, (batch, length)).transpose(1, 2)
            for columns in self.qkv_columns
        )
        return q, k, v

    def split_gate_up(self, joined: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Joined rows, which have to be there, as gate and up [T, F], views."""
        assert joined is not None
        gate_columns, up_columns = self.gate_up_columns
        return joined[:, gate_columns], joined[:, up_columns]

    def norms(self) -> dict[str, Norm | None]:
        return {name: getattr(self, name) for name in NORMS}

    def groups(self) -> list[ProjectionGroup]:
        return [self.qkv, self.output, self.gate_up, self.down]

    def parameters(self) -> list[torch.Tensor | None]:
        """Norm weights, then those of each group: the order of the gradients."""
        norms = [None if norm is None else norm.weight for norm in self.norms().values()]
        return norms + [parameter for group in self.groups() for parameter in group.parameters()]


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """What differs from call to call: rotary angles [B or 1, S, rotary_dim], the attention case and who picks its
    backend, what to keep, and `offload`, which takes to host memory what is kept there; with the attention half so do
    `rows_away`.

    `kept_weights` is where dequantised weights stay until the next call; None frees them after use, which
    `frees_weights` makes a recomputation do, too, before the backward needs them again; it also lets the weights of a
    group be there in turn (weights_in_turn.py). `gradient_room` is where the layers of a model find each other's
    gradients.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    attention: AttentionCase
    keep: Keep = Keep.ALL
    offload: Offload | None = None
    choose_backend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionCase], str] = choose_backend
    kept_weights: KeptWeights | None = None
    frees_weights: bool = False
    gradient_room: GradientRoom | None = None
    rows_away: RowsAway | None = None

    def __post_init__(self) -> None:
        if self.keep.is_offloaded and self.offload is None:
            raise ValueError(f"{self.keep} needs `offload`, which says where to")


def qkv_widths(qkv: ProjectionGroup, output: ProjectionGroup) -> tuple[int, int, int]:
    """Columns of q, k and v in the output of `qkv`, given the projection that takes as many heads as q has."""
    queries = output.in_features
    keys = (qkv.out_features - queries) // 2
    return queries, keys, keys


def decoder_layer_reference(
    x: torch.Tensor, layer: DecoderLayer, cos: torch.Tensor, sin: torch.Tensor, case: AttentionCase
) -> torch.Tensor:
    """The definition, differentiable, built from the reference of each part (no dropout)."""

    def norm(value: torch.Tensor, weights: Norm) -> torch.Tensor:
        return rms_norm_reference(value, weights.weight, weights.eps, offset=weights.offset)

    def joined(value: torch.Tensor, group: ProjectionGroup) -> torch.Tensor:
        return torch.cat([project_reference(value, projection) for projection in group.projections], dim=-1)

    qkv = joined(norm(x, layer.input_norm), layer.qkv)
    q, k, v = (qkv[..., c].unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for c in layer.qkv_columns)
    q = q if layer.query_norm is None else norm(q, layer.query_norm)
    k = k if layer.key_norm is None else norm(k, layer.key_norm)
    out = attention_reference(rope_reference(q, cos, sin), rope_reference(k, cos, sin), v, case)
    out = project_reference(out.transpose(1, 2).flatten(2), layer.output.projections[0])
    middle = x + (out if layer.attention_out_norm is None else norm(out, layer.attention_out_norm))
    gate_up = joined(norm(middle, layer.post_norm), layer.gate_up)
    gate, up = (gate_up[..., columns] for columns in layer.gate_up_columns)
    out = project_reference(glu_reference(gate, up, layer.activation), layer.down.projections[0])
    return middle + (out if layer.mlp_out_norm is None else norm(out, layer.mlp_out_norm))

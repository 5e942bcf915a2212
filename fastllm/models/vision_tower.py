"""Fast blocks of vision towers: pre-norm blocks as Qwen2-VL, Qwen2.5-VL and Qwen3-VL have them, each as one node.

A tower's blocks are called one after the other with the same segments and angles, so what they share (the attention
case, the choice of a kernel, the plan of what to keep) is found once a forward.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .._compat import attentions_are_collected, has_foreign_hooks
from ..kernels.attention import AttentionCase, choose_backend
from ..kernels.dispatch import compute_dtype
from ..kernels.documents import Documents
from ..kernels.layer_definition import Norm
from ..kernels.lora import ProjectionGroup
from ..kernels.vision_block import BlockCall, BlockPass, LayerNorm, VisionBlock, is_random, vision_block
from .blocks import Forward, checkpointing_requested
from .fused_parts import ACTIVATIONS
from .lora_view import CACHE, group_of
from .memory import ActivationPlanner, block_bytes
from .model_methods import PLANNER

# Attributes of each block: the tower that it belongs to, and its place there.
TOWER = "_fastllm_tower"
BLOCK_INDEX = "_fastllm_block_index"
# (output of the first half of an MLP, the second half), by their names in transformers.
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"), (("linear_fc1",), "linear_fc2"))


def vision_classes(module: Any, block: str) -> dict[type, type]:
    """The fast subclass of the class `block` of a transformers modeling module, e.g. `Qwen2VLVisionBlock`.

    Its instances have `norm1`, `attn` with `qkv` and `proj`, `norm2` and `mlp`, and are called with `cu_seqlens` and
    `position_embeddings`.
    """
    original = getattr(module, block)
    attributes = {
        "__module__": __name__,
        "forward": block_forward(original.forward),
        "gradient_checkpointing": property(lambda self: False, checkpointing_requested),
    }
    return {original: type(original.__name__, (original,), attributes)}


def block_forward(otherwise: Forward) -> Forward:
    """A whole vision block as one autograd node, where all its parts can be fused."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        block: VisionBlock | str = "its attention weights are wanted"
        if position_embeddings is not None and not attentions_are_collected():
            block = fused_block(self)
        tower: Tower = getattr(self, TOWER)
        if isinstance(block, str):
            call = functools.partial(
                otherwise, self, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
            )
            if tower.planner.setting is not False and self.training and torch.is_grad_enabled():
                return torch.utils.checkpoint.checkpoint(call, hidden_states, use_reentrant=False)  # pyright: ignore
            return call(hidden_states)
        assert position_embeddings is not None
        cos, sin = (angles.unsqueeze(0) for angles in position_embeddings)
        segments = tower.segments(cu_seqlens, self.attn, hidden_states.device)
        recompute = torch.is_grad_enabled() and tower.recomputes(hidden_states, block)
        call = BlockCall(segments.case, cos, sin, recompute, segments.choose_backend)
        recorded = tower.recorded(self, hidden_states, block, call)
        return vision_block(hidden_states, block, call) if recorded is None else recorded()

    return forward


def fused_block(block: Any) -> VisionBlock | str:
    """The vision block as tensors and numbers, or why it can't run as one node."""
    attention_module = block.attn
    implementation = attention_module.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"its attention implementation is {implementation!r}"
    activation = ACTIVATIONS.get(attention_module.config.hidden_act)
    if activation is None:
        return f"its activation is {attention_module.config.hidden_act!r}"
    for name, module in block._modules.items():
        if has_foreign_hooks(module):
            return f"a forward hook is registered on {name}"
    norms = [_norm_of(block.norm1), _norm_of(block.norm2)]
    for name, norm in zip(("norm1", "norm2"), norms, strict=True):
        if isinstance(norm, str):
            return f"{name}: {norm}"
    groups = _groups_of(attention_module, block.mlp)
    if isinstance(groups, str):
        return groups
    qkv, output, up, down = groups
    norm1, norm2 = norms
    assert not isinstance(norm1, str) and not isinstance(norm2, str)
    cache = block.__dict__.setdefault(CACHE, {})
    made_from = (*groups, *(norm.weight for norm in (norm1, norm2)), getattr(norm1, "bias", None))
    known = cache.get("block")
    if known is not None and all(a is b for a, b in zip(known[0], made_from, strict=True)):
        return known[1]
    fused = VisionBlock(norm1, qkv, output, norm2, up, down, activation, attention_module.head_dim)
    cache["block"] = (made_from, fused)
    return fused


class Tower:
    """What the blocks of one tower share. `planner` is that of the decoder, whose setting they follow."""

    def __init__(self, num_blocks: int, planner: ActivationPlanner) -> None:
        self.num_blocks = num_blocks
        self.planner = planner
        self._segments: collections.deque[Segments] = collections.deque(maxlen=2)  # full attention and windows

    def segments(self, cu_seqlens: torch.Tensor, attention_module: Any, device: torch.device) -> Segments:
        """The segments that one call of the tower gives to each of its blocks."""
        module = attention_module
        given = (module.scaling, module.attention_dropout if module.training else 0.0, device)
        for known in self._segments:
            if known.cu_seqlens is cu_seqlens and known.given == given:
                return known
        self._segments.append(Segments(cu_seqlens, given))
        return self._segments[-1]

    def recomputes(self, x: torch.Tensor, block: VisionBlock) -> bool:
        """Whether the blocks keep their inputs only, in a forward that will be differentiated."""
        kept = self.num_blocks * block_bytes(block, x.dtype)
        inputs = self.num_blocks * x.shape[-1] * x.dtype.itemsize
        return self.planner.recomputes_tower(x.shape[0], kept, inputs, x.device)

    def recorded(
        self, module: nn.Module, x: torch.Tensor, block: VisionBlock, call: BlockCall
    ) -> Callable[[], torch.Tensor] | None:
        """What runs the block of `module` as a recording, if anything does."""
        recordings, index = self.planner.recordings, getattr(module, BLOCK_INDEX)
        if index == 0:
            recordings.begin("tower", x, lambda: self.num_blocks * x.shape[0] * block_bytes(block, x.dtype))
        if is_random(block) or has_foreign_hooks(module):
            return None
        dtype = compute_dtype(x, block.qkv.dtype)
        return recordings.find(
            "tower", index, x, call, block, lambda: BlockPass(block, dtype), conditions=(dtype, call.recompute)
        )


class Segments:
    """Images, frames or windows that lie end to end, as a case of attention, and the kernel that serves it."""

    def __init__(self, cu_seqlens: torch.Tensor, given: tuple[float, float, torch.device]) -> None:
        self.cu_seqlens, self.given = cu_seqlens, given
        scaling, dropout, device = given
        documents = None if cu_seqlens.numel() == 2 else Documents.from_cu_seqlens(cu_seqlens).on(device)
        self.case = AttentionCase(scaling, None, dropout, documents=documents, causal=False)
        self._backends: dict[tuple, str] = {}

    def choose_backend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase) -> str:
        key = (q.dtype, q.device, torch.are_deterministic_algorithms_enabled())
        if key not in self._backends:
            # cuDNN compiles a plan for each new shape, and hardly any image has the size of another.
            self._backends[key] = choose_backend(q, k, v, case, allow_cudnn=False)
        return self._backends[key]


def attach_tower(blocks: Sequence[nn.Module], planner: ActivationPlanner) -> None:
    """Let the fast blocks of a model know of each other, and of the planner."""
    tower = Tower(len(blocks), planner)
    for index, block in enumerate(blocks):
        setattr(block, TOWER, tower)
        setattr(block, BLOCK_INDEX, index)
        setattr(block, PLANNER, planner)


def _norm_of(module: Any) -> LayerNorm | Norm | str:
    if hasattr(module, "variance_epsilon"):
        return Norm(module.weight, module.variance_epsilon)
    kind, weight, bias = type(module), getattr(module, "weight", None), getattr(module, "bias", None)
    if kind is nn.LayerNorm and weight is not None and bias is not None:
        return LayerNorm(weight, bias, module.eps)
    return f"it is a {kind.__name__}, not a LayerNorm with weight and bias or an RMSNorm"


def _groups_of(attention_module: Any, mlp: Any) -> tuple[ProjectionGroup, ...] | str:
    """(qkv; output; up, or gate and up; down), or why they can't be fused."""
    ups, down = next((names for names in _MLPS if hasattr(mlp, names[1])), ((), ""))
    if not down:
        return f"its MLP is a {type(mlp).__name__}"
    wanted = (
        (attention_module, ("qkv",)), (attention_module, ("proj",)), (mlp, ups), (mlp, (down,)),
    )  # fmt: skip
    groups = []
    for owner, names in wanted:
        group = group_of(owner, " ".join(names), [getattr(owner, name) for name in names])
        if isinstance(group, str):
            return f"{' or '.join(names)}: {group}"
        groups.append(group)
    return tuple(groups)

"""Fast blocks of vision towers: pre-norm blocks as transformers writes them for many families, each as one node.

A tower's blocks are called one after the other with the same segments and angles, so what they share (the attention
case, the choice of a kernel, the plan of what to keep) is found once a forward.
"""

from __future__ import annotations

import collections
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .._compat import attentions_are_collected, has_foreign_hooks, take_hidden_states
from ..kernels.attention import AttentionCase, choose_backend
from ..kernels.dispatch import compute_dtype
from ..kernels.documents import Documents
from ..kernels.layer_definition import Norm
from ..kernels.lora import ProjectionGroup, draws_masks
from ..kernels.vision_block import BlockCall, BlockPass, LayerNorm, VisionBlock, vision_block
from .blocks import Forward, checkpointing_requested
from .chains import Recordable
from .fused_parts import ACTIVATIONS, Made
from .lora_view import CACHE, group_of, watch_hooks
from .memory import ActivationPlanner, block_bytes, gradient_bytes
from .model_methods import PLANNER
from .packed_rows import attention_mask
from .watch import Watch, same

# Attributes of each block: the tower that it belongs to, and its place there.
TOWER = "_fastllm_tower"
BLOCK_INDEX = "_fastllm_block_index"
# Attention implementations whose result the fused blocks give.
SERVED_ATTENTION = ("sdpa", "eager")
# Boundaries that are remembered: full attention and windows of the latest batches.
_MOST_SEGMENTS = 16
# (output of the first half of an MLP, the second half), by their names in transformers.
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"), (("linear_fc1",), "linear_fc2"))


@dataclass(frozen=True, slots=True)
class BlockNames:
    """What the blocks of a family call their parts, and their attention its projections."""

    norm1: str
    attention: str
    norm2: str
    mlp: str = "mlp"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "out_proj"


def vision_classes(module: Any, block: str, names: BlockNames, *, hands_on: bool = False) -> dict[type, type]:
    """The fast subclass of the class `block` of a transformers modeling module, e.g. `SiglipEncoderLayer`.

    Its instances are called with `position_embeddings` where the tower has rotary angles, and learn what each patch
    sees from `cu_seqlens` (images, frames or windows that lie end to end), from a dense `attention_mask`, or from
    neither: then a patch sees its whole row. `hands_on`: what a block gives goes to the next one as it is, and nowhere
    else, as long as transformers does not collect it.
    """
    original = getattr(module, block)
    attributes = {
        "__module__": __name__,
        "block_names": names,
        "hands_on": hands_on,
        "forward": block_forward(original.forward),
        "gradient_checkpointing": property(lambda self: False, checkpointing_requested),
    }
    return {original: type(original.__name__, (original,), attributes)}


def is_vision_block(module: Any) -> bool:
    return hasattr(type(module), "block_names")


def block_forward(otherwise: Forward) -> Forward:
    """A whole vision block as one autograd node, where all its parts can be fused."""
    names = tuple(inspect.signature(otherwise).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden_states = take_hidden_states(given)
        lacks_angles = "position_embeddings" in names and given.get("position_embeddings") is None
        tower: Tower = getattr(self, TOWER)
        block: VisionBlock | str = "its attention weights are wanted, or it lacks rotary angles"
        if not (attentions_are_collected() or lacks_angles):
            ran = tower.planner.recordings.layer_in_chain("tower", getattr(self, BLOCK_INDEX))
            block = fused_block(self) if ran is None else ran
        if isinstance(block, str):
            if "cu_seqlens" not in names:
                given = _with_dense_mask(self, hidden_states, given)
            call = functools.partial(otherwise, self, **given)
            if tower.planner.setting is not False and self.training and torch.is_grad_enabled():
                return torch.utils.checkpoint.checkpoint(call, hidden_states, use_reentrant=False)  # pyright: ignore
            return call(hidden_states)
        call = _call_of(self, block, hidden_states, given)
        recorded = tower.recorded(self, hidden_states, block, call)
        return vision_block(hidden_states, block, call) if recorded is None else recorded()

    return forward


def fused_block(block: Any) -> VisionBlock | str:
    """The vision block as tensors and numbers, or why it can't run as one node."""
    cache = block.__dict__.setdefault(CACHE, {})
    known = cache.get("block")
    if known is not None and known.watch.holds():
        return known.fused
    watch, names = Watch(), block.block_names
    attention_module = getattr(block, names.attention)
    config = attention_module.config
    implementation = _implementation(config)
    if implementation not in SERVED_ATTENTION:
        return f"its attention implementation is {implementation!r}"
    activation = ACTIVATIONS.get(config.hidden_act)
    if activation is None:
        return f"its activation is {config.hidden_act!r}"
    if block._parameters:
        return f"it computes with {' and '.join(block._parameters)} besides"
    for name, module in block._modules.items():
        if has_foreign_hooks(module):
            return f"a forward hook is registered on {name}"
        watch_hooks(watch, module)
    norms = [_norm_of(getattr(block, name)) for name in (names.norm1, names.norm2)]
    for name, norm in zip((names.norm1, names.norm2), norms, strict=True):
        if isinstance(norm, str):
            return f"{name}: {norm}"
        watch.tensors(block._modules[name], "weight", "bias")
    groups = _groups_of(block, watch)
    if isinstance(groups, str):
        return groups
    qkv, output, up, down = groups
    norm1, norm2 = norms
    assert not isinstance(norm1, str) and not isinstance(norm2, str)
    watch.entries(block._modules, *block._modules)
    watch.entries(attention_module.__dict__, "head_dim")
    watch.entries(config.__dict__, "hidden_act")
    watch.answer(_implementation, config)
    tensors = [tensor for norm in (norm1, norm2) for tensor in (norm.weight, getattr(norm, "bias", None))]
    places = [(t.data_ptr(), t.requires_grad) for t in tensors if t is not None]
    made_from = (activation, *groups, *tensors, *places)
    if known is not None and same(known.made_from, made_from):
        cache["block"] = known._replace(watch=watch)
        return known.fused
    fused = VisionBlock(norm1, qkv, output, norm2, up, down, activation, attention_module.head_dim)
    cache["block"] = Made(fused, made_from, watch)
    return fused


class Tower:
    """What the blocks of one tower share. `planner` is that of the decoder, whose setting they follow."""

    def __init__(self, num_blocks: int, planner: ActivationPlanner) -> None:
        self.num_blocks = num_blocks
        self.planner = planner
        self._segments: collections.deque[Segments] = collections.deque(maxlen=_MOST_SEGMENTS)
        self._single_image: Documents | None = None
        self._calls: collections.deque[tuple[Any, Any, tuple, BlockCall]] = collections.deque(maxlen=2)
        self._in_one_row: tuple[BlockCall, BlockCall] | None = None

    def segments(self, cu_seqlens: torch.Tensor | None, attention_module: Any, device: torch.device) -> Segments:
        """The segments that one call of the tower gives to each of its blocks; None: whole rows."""
        given = (*_scaling_and_dropout(attention_module), device)
        for known in self._segments:
            if known.cu_seqlens is cu_seqlens and known.given == given:
                return known
        self._segments.append(Segments(cu_seqlens, given))
        return self._segments[-1]

    def recomputes(self, x: torch.Tensor, block: VisionBlock) -> bool:
        """Whether the blocks keep their inputs only, in a forward that will be differentiated."""
        kept = self.num_blocks * block_bytes(block, x.dtype)
        inputs = self.num_blocks * x.shape[-1] * x.dtype.itemsize
        return self.planner.recomputes_tower(x.shape[:-1].numel(), kept, inputs, x.device)

    def recorded(
        self, module: Any, x: torch.Tensor, block: VisionBlock, call: BlockCall
    ) -> Callable[[], torch.Tensor] | None:
        """What runs the block of `module` as a recording, if anything does."""
        recordings, index = self.planner.recordings, getattr(module, BLOCK_INDEX)
        rounds = x.dim() == 2 and call.attention.mask is None  # images end to end
        if index == 0:
            patches = self.num_blocks * x.shape[:-1].numel()
            recordings.begin(
                "tower", x, block,
                lambda: patches * block_bytes(block, x.dtype) + self.num_blocks * gradient_bytes(block),
                round_rows=rounds,
                is_wanted=not self.planner.spares_recordings(self.num_blocks * x.nbytes, x.device),
            )  # fmt: skip
        if draws_masks(block) or has_foreign_hooks(module):
            return None
        if rounds:
            call = self._call_in_one_row(call, x)
        dtype = compute_dtype(x, block.qkv.dtype)
        how = Recordable(module, fused_block, lambda block: BlockPass(block, dtype), vision_block, module.hands_on)
        return recordings.find("tower", index, x, call, block, how, conditions=(dtype, call.recompute))

    def call(
        self, angles: Any, cu_seqlens: torch.Tensor | None, given: tuple, make: Callable[[], BlockCall]
    ) -> BlockCall:
        """What `make` gave for the same angles and boundaries in the same setting, if a block just asked for it."""
        for known_angles, known_cu_seqlens, known_given, call in self._calls:
            if known_angles is angles and known_cu_seqlens is cu_seqlens and known_given == given:
                return call
        self._calls.append((angles, cu_seqlens, given, make()))
        return self._calls[-1][-1]

    def _call_in_one_row(self, call: BlockCall, x: torch.Tensor) -> BlockCall:
        """The call with all rows as a document where it has no documents, made once for blocks that share it."""
        if self._in_one_row is None or self._in_one_row[0] is not call:
            documents = call.attention.documents or self.single_image(x)
            self._in_one_row = call, replace(call, attention=replace(call.attention, documents=documents))
        return self._in_one_row[1]

    def single_image(self, x: torch.Tensor) -> Documents:
        """All rows as one document, made once a forward."""
        known = self._single_image
        if known is None or known.length != x.shape[0] or known.cu_seqlens.device != x.device:
            known = self._single_image = Documents.whole_rows(1, x.shape[0], x.device)
        return known


class Segments:
    """Images, frames or windows that lie end to end, or whole rows, as a case of attention, and the kernel that serves
    it."""

    def __init__(self, cu_seqlens: torch.Tensor | None, given: tuple[float, float, torch.device]) -> None:
        self.cu_seqlens, self.given = cu_seqlens, given
        scaling, dropout, device = given
        documents = None
        if cu_seqlens is not None and cu_seqlens.numel() > 2:
            documents = Documents.from_cu_seqlens(cu_seqlens).on(device)
        self.case = AttentionCase(scaling, None, dropout, documents=documents, causal=False)
        self._backends: dict[tuple, str] = {}

    def choose_backend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase) -> str:
        key = (q.dtype, q.device, case.documents is None, torch.are_deterministic_algorithms_enabled())
        if key not in self._backends:
            # cuDNN compiles a plan for each new shape. Whole rows have few; where sizes are given, hardly any image has
            # the size of another.
            self._backends[key] = choose_backend(q, k, v, case, allow_cudnn=self.cu_seqlens is None)
        return self._backends[key]


def attach_tower(blocks: Sequence[nn.Module], planner: ActivationPlanner) -> None:
    """Let the fast blocks of a model know of each other, and of the planner."""
    tower = Tower(len(blocks), planner)
    for index, block in enumerate(blocks):
        setattr(block, TOWER, tower)
        setattr(block, BLOCK_INDEX, index)
        setattr(block, PLANNER, planner)


def _call_of(block_module: Any, block: VisionBlock, x: torch.Tensor, given: Mapping[str, Any]) -> BlockCall:
    """What one call of a block asks for, from the arguments that transformers passes."""
    tower: Tower = getattr(block_module, TOWER)
    attention_module = getattr(block_module, block_module.block_names.attention)
    angles = given.get("position_embeddings")
    mask = given.get("attention_mask")
    cu_seqlens = given.get("cu_seqlens")
    recompute = torch.is_grad_enabled() and tower.recomputes(x, block)
    scaling, dropout = _scaling_and_dropout(attention_module)

    def make() -> BlockCall:
        cos, sin = (None, None) if angles is None else (part.unsqueeze(0) for part in angles)
        if mask is None:
            segments = tower.segments(cu_seqlens, attention_module, x.device)
            return BlockCall(segments.case, cos, sin, recompute, segments.choose_backend)
        seen = mask.to(compute_dtype(x, block.qkv.dtype)) if mask.is_floating_point() else mask
        return BlockCall(AttentionCase(scaling, seen, dropout, causal=False), cos, sin, recompute)

    if mask is not None:
        return make()
    return tower.call(angles, cu_seqlens, (scaling, dropout, recompute, x.device, x.shape[:-1]), make)


def _with_dense_mask(block_module: Any, x: torch.Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call in which `cu_seqlens` became the mask that transformers' attention wants."""
    given = dict(given)
    cu_seqlens = given.pop("cu_seqlens", None)
    if cu_seqlens is None:
        return given
    attention_module = getattr(block_module, block_module.block_names.attention)
    documents = getattr(block_module, TOWER).segments(cu_seqlens, attention_module, x.device).case.documents
    if documents is not None:
        given["attention_mask"] = attention_mask(documents.mask(causal=False), attention_module, x.dtype)
    return given


def _scaling_and_dropout(attention_module: Any) -> tuple[float, float]:
    """The numbers of an attention, which families call by different names; Llama 3.2 Vision's has no dropout."""
    module = attention_module
    scaling = module.scaling if hasattr(module, "scaling") else module.scale
    rate = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    return scaling, rate if module.training else 0.0


def _norm_of(module: Any) -> LayerNorm | Norm | str:
    if hasattr(module, "variance_epsilon"):
        return Norm(module.weight, module.variance_epsilon)
    kind, weight, bias = type(module), getattr(module, "weight", None), getattr(module, "bias", None)
    if kind is nn.LayerNorm and weight is not None and bias is not None:
        return LayerNorm(weight, bias, module.eps)
    return f"it is a {kind.__name__}, not a LayerNorm with weight and bias or an RMSNorm"


def _implementation(config: Any) -> str:
    return config._attn_implementation


def _groups_of(block: Any, watch: Watch) -> tuple[ProjectionGroup, ...] | str:
    """(qkv; output; up, or gate and up; down), or why they can't be fused; `watch` learns what that depends on."""
    names: BlockNames = block.block_names
    attention_module, mlp = getattr(block, names.attention), getattr(block, names.mlp)
    ups, down = next((parts for parts in _MLPS if hasattr(mlp, parts[1])), ((), ""))
    if not down:
        return f"its MLP is a {type(mlp).__name__}"
    wanted = (
        (attention_module, names.qkv), (attention_module, (names.output,)), (mlp, ups), (mlp, (down,)),
    )  # fmt: skip
    groups = []
    for owner, parts in wanted:
        modules = [getattr(owner, part) for part in parts]
        group = group_of(owner, " ".join(parts), modules, watch)
        if isinstance(group, str):
            return f"{' or '.join(parts)}: {group}"
        groups.append(group)
    return tuple(groups)

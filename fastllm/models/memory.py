"""The memory planner: which decoder layers keep their activations, recompute them, or send their input to the host,
and which of them also keep their dequantised weights.

The plan is made from the memory that is free when a longer batch than before arrives, and from the arithmetic of the
layers. It only ever trades time: every plan gives the same gradients, bit for bit in deterministic mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .._device import free_bytes, free_host_bytes, host_link_rate, product_rate
from .._errors import ArgumentError
from .._notices import notice
from ..kernels.attention import AttentionCase, choose_backend
from ..kernels.decoder_activations import RowsAway
from ..kernels.gradient_room import GradientRoom
from ..kernels.kept_weights import KeptWeights
from ..kernels.layer_definition import DecoderLayer, Keep
from ..kernels.vision_block import VisionBlock
from .host_offload import HostOffload
from .recordings import Recordings, most_rows
from .spare_link import SpareLink
from .weight_keeping import WeightKeeper

GIB = 2**30
# Part of the free memory that is left alone: fragmentation, cuBLAS workspaces, what other code allocates.
_MARGIN = 0.06
_MARGIN_BYTES = GIB // 2
# Part of the free memory that the vision tower may keep. A byte kept in a decoder layer spares more arithmetic than one
# kept there, as decoders are wider.
_TOWER_SHARE = 1 / 8
# Plans are made anew for each step of what the tower holds; the margin covers a step.
_TOWER_STEP = GIB // 4
# Layer inputs of up to this size in all stay on the device: sending them away would take longer than it is worth.
_SMALL_INPUTS = 64 * 2**20
# A vision tower whose inputs take no more is recorded with the least memory as well: what that takes beside them, about
# as much again, brings back more than half of the time of such a step.
_RECORDED_TOWER_INPUTS = 256 * 2**20
# Part of the host's free memory that activations may take.
_HOST_SHARE = 0.5
# cuDNN compiles a plan for each new shape (0.1 s on an H200); it pays once this much attention, in queries times keys,
# has been computed at that shape.
_CUDNN_AFTER_SCORES = 2**25


def checkpointing_setting(value: bool | str) -> bool | str:
    """The value of a `use_gradient_checkpointing` argument, checked; `unsloth` and `fastllm` are one setting."""
    if isinstance(value, str):
        lowered = value.lower()
        known = {"unsloth": "fastllm", "fastllm": "fastllm", "offload": "offload", "true": True, "false": False}
        if lowered in known:
            return known[lowered]
    elif isinstance(value, bool):
        return value
    raise ArgumentError(
        f"got {value!r}",
        where="use_gradient_checkpointing",
        fix='use "fastllm" (planned from free memory; "unsloth" is the same), "offload" (least memory), True or False',
    )


class ActivationPlanner:
    """What each decoder layer of one model keeps between forward and backward.

    `setting` is `False` (keep everything), `True` (recompute everything from each layer's input), `"offload"` (the same
    with the inputs in host memory: the least device memory) or `"fastllm"` (planned). `reserved_bytes` is memory that
    training will take later: gradients and optimiser states. `tower_bytes` is what the vision tower, which runs first,
    keeps of the present batch: a plan holds for batches that leave as much.

    Where the plan keeps all activations and memory is still free, layers also keep their dequantised 4-bit weights.
    """

    def __init__(self, num_layers: int, setting: bool | str = "fastllm") -> None:
        self.num_layers = num_layers
        self.setting = checkpointing_setting(setting)
        self.reserved_bytes = 0
        self.tower_bytes = 0
        self._plans: dict[tuple[int, int], list[Keep]] = {}
        self._tower_plans: dict[int, bool] = {}
        self._plan: list[Keep] = []
        self._weights = WeightKeeper(num_layers)
        self.recordings = Recordings()
        self._told = ""
        self.gradient_room = GradientRoom()
        self._offload = HostOffload()
        self._spare_link = SpareLink()
        self._last_index = num_layers
        self._shape: tuple = ()
        self._forwards_of_shape: dict[tuple, int] = {}
        self._backends: dict[tuple, str] = {}

    def use(self, setting: bool | str) -> None:
        self.setting = checkpointing_setting(setting)
        self._plans.clear()
        self._tower_plans.clear()
        self.recordings.release()
        self._weights.release("use_gradient_checkpointing is set anew")
        self._weights = WeightKeeper(self.num_layers)

    def keep(self, index: int, x: torch.Tensor, layer: DecoderLayer) -> Keep:
        """What layer `index` keeps, given its input `x [B, S, D]`, in a forward that will be differentiated."""
        if index <= self._last_index:
            self._begin(x, layer)
        self._last_index = index
        if not self._plan[index].is_offloaded:
            self._offload.turn()
        return self._plan[index]

    def kept_weights(self, index: int, x: torch.Tensor) -> KeptWeights | None:
        """Where layer `index` keeps its dequantised weights; None if it does not."""
        return self._weights.of_layer(index, x.device)

    @property
    def frees_weights(self) -> bool:
        """Whether layers of this forward dequantise their weights once more in the backward, one group at a time, or
        two where only the MLP is computed again, and those of a short batch one weight at a time: the largest of a
        layer need as much memory as all else in it. Small batches, which wait for the host, do not."""
        return self.setting == "offload" and any(keep.is_offloaded for keep in self._plan)

    def spares_recordings(self, inputs: int, device: torch.device) -> bool:
        """Whether layers whose inputs take so many bytes are not recorded, for the sake of memory: a recording holds
        its own from step to step."""
        return self.setting == "offload" and device.type == "cuda" and inputs > _RECORDED_TOWER_INPUTS

    def release_weights(self, reason: str) -> None:
        """Free every kept weight and recording; training that goes on makes them again."""
        self.recordings.release()
        self._weights.release(reason)

    def release_host_memory(self) -> None:
        """Give back the host memory for activations; training that goes on takes it again."""
        self._offload.release()

    def offload(self, tensors: Sequence[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
        return self._offload.put(tensors)

    def rows_away(self, index: int, rows: int) -> RowsAway | None:
        """Which of the rows of gate and up's output in layer `index` go to the host beside its attention half."""
        count = self._spare_link.rows(rows) if self._sends_halves and self._plan[index].is_offloaded else 0
        return RowsAway(count, self._offload.put_rows) if count else None

    @property
    def _sends_halves(self) -> bool:
        """Whether every layer that sends something to the host sends its attention half: the host has room for all."""
        return Keep.OFFLOADED_ATTENTION in self._plan and Keep.OFFLOADED_INPUT not in self._plan

    def attention_backend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase) -> str:
        """The attention kernel of this forward: the same in all layers that see the same shapes."""
        scores = q.shape[0] * q.shape[2] * k.shape[2]
        allow_cudnn = self._forwards_of_shape.get(self._shape, 0) * scores >= _CUDNN_AFTER_SCORES
        num_documents = 0 if case.documents is None else case.documents.cu_seqlens.numel()
        given = (case.mask is not None, case.function is not None, num_documents)
        key = (q.shape, k.shape, q.dtype, q.device, given, case.sliding_window, case.softcap, case.dropout, case.causal,
               allow_cudnn, torch.are_deterministic_algorithms_enabled())  # fmt: skip
        if key not in self._backends:
            self._backends[key] = choose_backend(q, k, v, case, allow_cudnn=allow_cudnn)
        return self._backends[key]

    def recomputes_tower(self, patches: int, kept: int, inputs: int, device: torch.device) -> bool:
        """Whether the blocks of the vision tower keep their inputs only, `inputs` bytes a patch, instead of `kept`, in
        a forward that will be differentiated. The decoder's plan is made beside what they hold."""
        recompute = self.setting is not False
        if self.setting == "fastllm":
            bucket = -(-patches // 1024) * 1024
            if bucket not in self._tower_plans:
                free = free_bytes(device)
                self._tower_plans[bucket] = bucket * kept > _TOWER_SHARE * free
                if self._tower_plans[bucket]:
                    notice(
                        f"fastllm: the vision tower recomputes its blocks: activations of up to {bucket:,} patches "
                        f"would take {bucket * kept / GIB:.1f} of {free / GIB:.1f} GiB free",
                        once="tower:recompute",
                    )
            recompute = self._tower_plans[bucket]
        self.tower_bytes = patches * (inputs if recompute else kept)
        return recompute

    def describe(self) -> str:
        """The latest plan in a line."""
        plan = self._told or f"activations: {self.setting!r}"
        count = self.recordings.count
        return f"{plan}; launches of {count} batch shapes are recorded" if count else plan

    def _begin(self, x: torch.Tensor, layer: DecoderLayer) -> None:
        """Start a forward: the layers count up from here."""
        self._shape = tuple(x.shape)
        self._forwards_of_shape[self._shape] = self._forwards_of_shape.get(self._shape, 0) + 1
        tokens = x.shape[0] * x.shape[1]
        step = 1024 if tokens > 1024 else 256
        bucket = -(-tokens // step) * step
        beside, self.tower_bytes = -(-self.tower_bytes // _TOWER_STEP), 0
        if (bucket, beside) not in self._plans:
            self._plans[bucket, beside] = self._make_plan(layer, bucket, x.device, x.dtype)
        self._plan = self._plans[bucket, beside]
        self._spare_link.begin(
            self._offload, sends=self._sends_halves, layers=self.num_layers, rows=tokens,
            row_bytes=layer.gate_up.output_buffer_width * x.dtype.itemsize, host_share=_HOST_SHARE,
        )  # fmt: skip
        kept = self._plan.count(Keep.ALL)
        # The last layer alone would hold a workspace beside that of the others.
        self.recordings.begin(
            "decoder", x, layer, lambda: _recorded_bytes(LayerBytes.of(layer, x.dtype), tokens, self.num_layers, kept),
            is_wanted=not any(keep.is_offloaded for keep in self._plan),
        )  # fmt: skip

    def _make_plan(self, layer: DecoderLayer, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Keep]:
        """The plan of batches of up to `tokens`. Also settles how many layers keep their weights beside it."""
        count = self.num_layers
        if self.setting is False:
            return [Keep.ALL] * count
        if self.setting is True:
            return [Keep.INPUT] * count
        sizes = LayerBytes.of(layer, dtype)
        if tokens > max((planned for planned, _ in self._plans), default=0):  # its pieces of host memory are longer
            self._offload.release()
        floor = self._floor(layer, sizes, tokens, device)
        if self.setting == "offload":
            # The last layer's backward comes at once, and needs as much as it would keep.
            plan = [*self._least(floor, count - 1, sizes, tokens), Keep.ALL if floor.is_offloaded else Keep.INPUT]
            _tell_of_host(plan, tokens, sizes)
            return plan
        self.recordings.release()
        free = free_bytes(device) + self._weights.nbytes
        budget = free - _MARGIN * free - _MARGIN_BYTES - self.reserved_bytes - sizes.transient(tokens)
        kept, on_device = self._layers_that_fit(sizes, tokens, budget, floor)
        plan = self._least(floor, count - kept - on_device, sizes, tokens)
        plan += [Keep.INPUT] * on_device + [Keep.ALL] * kept
        beside_one = (count * sizes.layer_input + (count - 1) * sizes.stash) * tokens
        spare = budget - beside_one if kept == count else 0
        spare -= _recorded_bytes(sizes, tokens, count, count) if tokens <= most_rows(layer) else 0
        self._weights.allow(spare, sizes.kept_weights, device, f"a batch of up to {tokens:,} tokens takes the memory")
        held = tokens * (kept * sizes.stash + (kept + on_device) * sizes.layer_input)
        self.recordings.beside = max(self.recordings.beside, held + sizes.transient(tokens))
        self._tell(plan, tokens, sizes, held, free)
        _tell_of_host(plan, tokens, sizes)
        return plan

    def _layers_that_fit(self, sizes: LayerBytes, tokens: int, budget: float, floor: Keep) -> tuple[int, int]:
        """How many layers keep everything, and how many of the others their input on the device. What the last one
        keeps is not part of the budget, but of what a backward takes for a moment."""
        count = self.num_layers
        layer_input, stash = sizes.layer_input * tokens, max(1, sizes.stash * tokens)
        more = max(0, min(count - 1, int((budget - count * layer_input) // stash)))
        if floor is Keep.OFFLOADED_ATTENTION and more < count - 1:
            # A layer whose attention half is on the host takes less here than one with its input, and is faster.
            moving = sizes.attention_half * tokens + layer_input
            more = max(0, min(count - 2, int((budget - moving) // (layer_input + stash))))
            return 1 + more, 0
        if more == 0:
            return 1, max(0, min(count - 1, int(budget // max(1, layer_input)) - 1))
        return 1 + more, count - 1 - more

    def _floor(self, layer: DecoderLayer, sizes: LayerBytes, tokens: int, device: torch.device) -> Keep:
        """What a layer keeps at the least: its input, here where the inputs of all layers are small, else on the host;
        or there all of its attention half, where the copies cost no more than they spare and the host has room for
        one."""
        if device.type != "cuda" or self.num_layers * sizes.layer_input * tokens <= _SMALL_INPUTS:
            return Keep.INPUT
        if tokens <= most_rows(layer):
            return Keep.OFFLOADED_INPUT  # the GPU waits for Python, which arithmetic that is spared does not change
        copying = sizes.attention_half / host_link_rate(device)
        spared = sizes.attention_flops / product_rate(device)
        forward = (sizes.attention_flops + sizes.mlp_flops) / product_rate(device)
        if copying < forward + spared and Keep.OFFLOADED_ATTENTION in self._least(
            Keep.OFFLOADED_ATTENTION, self.num_layers - 1, sizes, tokens
        ):
            return Keep.OFFLOADED_ATTENTION
        return Keep.OFFLOADED_INPUT

    def _least(self, floor: Keep, count: int, sizes: LayerBytes, tokens: int) -> list[Keep]:
        """So many layers that keep `floor`; where that is their attention half, as many of them, the last ones, as the
        host has room for beside the inputs of the others."""
        if floor is not Keep.OFFLOADED_ATTENTION:
            return [floor] * count
        room = _HOST_SHARE * (free_host_bytes() + self._offload.nbytes) - count * sizes.layer_input * tokens
        more = (sizes.attention_half - sizes.layer_input) * tokens
        halves = max(0, min(count, int(room / more)))
        return [Keep.OFFLOADED_INPUT] * (count - halves) + [floor] * halves

    def _tell(self, plan: list[Keep], tokens: int, sizes: LayerBytes, held: int, free: int) -> None:
        counts = {keep: plan.count(keep) for keep in Keep}
        parts = ", ".join(f"{counts[keep]} {keep.value}" for keep in Keep if counts[keep])
        if self._weights.num_layers:
            parts += f"; {self._weights.num_layers} keep their dequantised weights"
            held += self._weights.num_layers * sizes.kept_weights
        share = f"about {held / GIB:.1f} of {free / GIB:.1f} GiB free"
        line = f"fastllm: activations of up to {tokens:,} tokens: {parts} ({share})"
        if parts not in self._told:
            notice(line)
        self._told = line


def _tell_of_host(plan: list[Keep], tokens: int, sizes: LayerBytes) -> None:
    inputs, halves = plan.count(Keep.OFFLOADED_INPUT), plan.count(Keep.OFFLOADED_ATTENTION)
    on_host = tokens * (inputs * sizes.layer_input + halves * sizes.attention_half)
    if on_host:
        what = "inputs and attention halves of layers" if halves else "inputs of layers"
        if inputs and halves:
            what = f"inputs of {inputs} layers, and attention halves of {halves} more, as far as the host has room,"
        notice(f"fastllm: {what} wait in host memory: about {on_host / GIB:.1f} GiB for {tokens:,} tokens")


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes a token that a layer holds (`stash` beside its input when it keeps all, `layer_input` always; of both
    `attention_half` is what comes before the MLP), what its backward needs at most for a moment, what its weights take
    where they stay dequantised, and what all gradients of its trained parameters take; `head` is what a model's head
    needs besides. And the arithmetic of the matrix products of a layer's halves, a token and forward."""

    stash: int
    layer_input: int
    attention_half: int
    backward: int
    weights: int
    kept_weights: int
    gradients: int
    head: int
    attention_flops: int
    mlp_flops: int

    @classmethod
    def of(cls, layer: DecoderLayer, dtype: torch.dtype) -> LayerBytes:
        size = dtype.itemsize
        width, inner = layer.down.out_features, layer.down.in_features
        qkv, attended = layer.qkv.out_features, layer.output.in_features
        extensions = sum(group.extension for group in layer.groups())
        raw = qkv if layer.query_norm is not None else 0
        normed = sum(norm is not None for norm in (layer.attention_out_norm, layer.mlp_out_norm))
        has_out_norm = layer.attention_out_norm is not None
        attention_half = qkv + raw + attended + (2 + has_out_norm) * width
        attention_half += layer.qkv.extension + layer.output.extension
        stash = size * (qkv + raw + attended + (1 + normed) * width + 2 * inner + extensions)
        stash += 4 * (attended // layer.head_dim + 4 + normed)
        backward = size * (3 * inner + (6 + 2 * normed) * width + 2 * qkv + attended)
        # Before an FP8 product its input is written a second time, a byte a value.
        backward += max(max(group.in_features, group.out_features) * group.is_fp8 for group in layer.groups())
        weights = sum(group.out_features * (group.in_features + group.extension) for group in layer.groups())
        head = 3 * 2**28 + 2**30 * layer.qkv.is_fp8  # chunks of logits; in FP8 those too, and the transposed weight
        # Under autocast they are smaller than this.
        widest = max(dtype, layer.qkv.dtype or dtype, key=lambda dtype: dtype.itemsize)
        kept_weights = sum(group.kept_bytes(widest) for group in layer.groups())
        attention_flops, mlp_flops = (
            sum(2 * group.in_features * group.out_features for group in groups)
            for groups in ((layer.qkv, layer.output), (layer.gate_up, layer.down))
        )
        return cls(
            stash=stash, layer_input=size * width, attention_half=size * attention_half, backward=backward,
            weights=size * weights, kept_weights=kept_weights, gradients=gradient_bytes(layer), head=head,
            attention_flops=attention_flops, mlp_flops=mlp_flops,
        )  # fmt: skip

    def transient(self, tokens: int) -> int:
        """The most that is alive at once besides what all layers but one keep: a layer's backward, or the head's chunks
        and what the last layer keeps."""
        return max(tokens * self.backward + self.weights, tokens * (2 * self.layer_input + self.stash) + self.head)


def _recorded_bytes(sizes: LayerBytes, tokens: int, layers: int, kept: int) -> int:
    """What the layers hold from step to step where their launches are recorded and `kept` of them keep everything."""
    held = layers * (tokens * sizes.layer_input + sizes.gradients) + tokens * kept * sizes.stash
    return held + tokens * sizes.backward + sizes.weights


def training_bytes(model: torch.nn.Module) -> int:
    """What training takes besides activations: of each trained parameter a gradient and two optimiser states in fp32,
    and for the head the sum over chunks of rows, in fp32, that its gradient is made from."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    summed = () if head is None else head.parameters()
    trained = sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)
    return trained + sum(4 * p.numel() for p in summed if p.requires_grad)


def gradient_bytes(layer: DecoderLayer | VisionBlock) -> int:
    """Bytes of the gradients of one layer's trained parameters."""
    return sum(p.nbytes for p in layer.parameters() if p is not None and p.requires_grad)


def block_bytes(block: VisionBlock, dtype: torch.dtype) -> int:
    """Bytes a token that a vision block holds when it keeps its activations."""
    width, attended = block.down.out_features, block.output.in_features
    extensions = sum(group.extension for group in block.groups())
    kept = 2 * width + block.qkv.out_features + attended + block.up.out_features + extensions
    return dtype.itemsize * kept + 4 * (attended // block.head_dim + 4)

"""A whole pre-norm block of a vision tower as one autograd node with a hand-written backward.

    a = x + o(attention(rope(qkv(norm1(x)))))          y = a + down(act(up(norm2(a))))

Attention sees both ways, inside the segments that the call names (images, frames or windows). Norms are LayerNorm or
RMSNorm; an MLP of two projections in `up` is gated, act(gate) * up. What this buys is what it buys in
`decoder_layer.py`, above all few launches: towers are small, and wait for the host.

Shapes: x, y [S, D], all images end to end, or [B, S, D]; inside, rows [T, D]. Heads as [B, heads, S, head_dim].
Dtypes: the residual stream keeps x's dtype; matrix products run in the compute dtype (autocast's, else the weights').
Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929, equations 2 and 3; rotation by rows and
columns and windows: Qwen2.5-VL, arXiv 2502.13923, section 2.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .activation import activation_backward, activation_forward, activation_reference
from .attention import (
    AttentionCase,
    AttentionResult,
    attention_backward,
    attention_forward,
    attention_reference,
    choose_backend,
)
from .dispatch import compute_dtype, no_autocast, rows_of
from .glu import glu_backward, glu_forward, glu_reference
from .layer_definition import Norm
from .layer_norm import layer_norm_backward, layer_norm_forward, layer_norm_reference
from .lora import (
    PARAMETERS_PER_PROJECTION,
    PreparedGroups,
    ProjectionGroup,
    draws_masks,
    dropout_masks,
    input_grad,
    low_rank_input,
    parameter_grads,
    project,
    project_reference,
)
from .random_state import random_state, replayed
from .rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference
from .rope import rope_apply, rope_reference
from .row_copy import copy_rows

_PARAMETERS_PER_NORM = 2


@dataclass(frozen=True, slots=True, eq=False)
class LayerNorm:
    """A LayerNorm's weight and bias [D] and its constant."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class VisionBlock:
    """One block as tensors and numbers.

    `qkv` is one projection or three, its joined columns q, k and v of equal width; `up` is one projection, or gate and
    up of a gated MLP.
    """

    norm1: LayerNorm | Norm
    qkv: ProjectionGroup
    output: ProjectionGroup
    norm2: LayerNorm | Norm
    up: ProjectionGroup
    down: ProjectionGroup
    activation: str
    head_dim: int

    @property
    def is_gated(self) -> bool:
        return len(self.up.projections) == 2

    def groups(self) -> list[ProjectionGroup]:
        return [self.qkv, self.output, self.up, self.down]

    def parameters(self) -> list[torch.Tensor | None]:
        """Weight and bias of each norm, then the parameters of each group: the order of the gradients."""
        norms = [tensor for norm in (self.norm1, self.norm2) for tensor in (norm.weight, getattr(norm, "bias", None))]
        return norms + [parameter for group in self.groups() for parameter in group.parameters()]


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """What differs from call to call: the attention case and who picks its backend, rotary angles [B or 1, S,
    rotary_dim] where the tower has them, and whether the block keeps its input only and computes the rest again."""

    attention: AttentionCase
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    recompute: bool = False
    choose_backend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionCase], str] = choose_backend


@dataclass(slots=True, eq=False)
class _Activations:
    """Everything that a backward reads. Rows are [T, width]; a `low_rank` is x A^T of its group."""

    x: torch.Tensor
    statistics1: tuple[torch.Tensor, ...]
    qkv: torch.Tensor
    qkv_low_rank: torch.Tensor | None
    qkv_masks: list[torch.Tensor | None]
    attention: AttentionResult
    output_low_rank: torch.Tensor | None
    output_masks: list[torch.Tensor | None]
    middle: torch.Tensor  # a, the residual stream after attention
    statistics2: tuple[torch.Tensor, ...]
    up: torch.Tensor | None  # freed as soon as its gradient is known
    up_low_rank: torch.Tensor | None
    up_masks: list[torch.Tensor | None]
    down_low_rank: torch.Tensor | None = None
    down_masks: Sequence[torch.Tensor | None] = (None,)


def vision_block(x: torch.Tensor, block: VisionBlock, call: BlockCall) -> torch.Tensor:
    """The block under autograd: gradients for x and for every trainable tensor of `block.parameters()`."""
    return _VisionBlock.apply(x, block, call, *block.parameters())


def vision_block_reference(x: torch.Tensor, block: VisionBlock, call: BlockCall) -> torch.Tensor:
    """The definition, differentiable, built from the reference of each part (no dropout)."""

    def norm(value: torch.Tensor, weights: LayerNorm | Norm) -> torch.Tensor:
        if isinstance(weights, LayerNorm):
            return layer_norm_reference(value, weights.weight, weights.bias, weights.eps)
        return rms_norm_reference(value, weights.weight, weights.eps, offset=weights.offset)

    def group(value: torch.Tensor, projections: ProjectionGroup) -> torch.Tensor:
        return torch.cat([project_reference(value, projection) for projection in projections.projections], dim=-1)

    batched = x if x.dim() == 3 else x[None]
    q, k, v = _heads(block, group(norm(batched, block.norm1), block.qkv).flatten(0, 1), batched.shape[0])
    if call.cos is not None and call.sin is not None:
        q, k = rope_reference(q, call.cos, call.sin), rope_reference(k, call.cos, call.sin)
    attended = attention_reference(q, k, v, call.attention).transpose(1, 2).flatten(2)
    middle = batched + group(attended, block.output)
    hidden = group(norm(middle, block.norm2), block.up)
    if block.is_gated:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = glu_reference(gate, up, block.activation)
    else:
        hidden = activation_reference(hidden, block.activation)
    return (middle + group(hidden, block.down)).view(x.shape)


@dataclass(frozen=True, slots=True, eq=False)
class BlockPass:
    """The block outside autograd, in one compute dtype and without random numbers, as recorded_pass.py wants it."""

    block: VisionBlock
    dtype: torch.dtype

    def forward(self, x: torch.Tensor, call: BlockCall) -> tuple[torch.Tensor, _Activations | None, str]:
        return _forward_pass(self.block, call, x, self.dtype, keep_all=not call.recompute)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, call: BlockCall, kept: _Activations | None, backend: str,
        needs: Sequence[bool],
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:  # fmt: skip
        return _backward_pass(self.block, call, dy, x, self.dtype, kept, backend, needs, rng=None)


class _VisionBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block, call, *parameters):
        ctx.block, ctx.call, ctx.dtype = block, call, compute_dtype(x, block.qkv.dtype)
        needs_backward = any(ctx.needs_input_grad)
        keep_all = needs_backward and not call.recompute
        draws = call.attention.dropout > 0 or draws_masks(block)
        ctx.rng = random_state(x.device) if needs_backward and call.recompute and draws else None
        with no_autocast(x.device.type):
            y, ctx.kept, ctx.backend = _forward_pass(block, call, x, ctx.dtype, keep_all=keep_all)
        ctx.save_for_backward(*parameters, x)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, kept = ctx.saved_tensors[-1], ctx.kept
        ctx.kept = None
        if kept is None and not ctx.call.recompute:
            raise RuntimeError(
                "the activations of this vision block were freed by an earlier backward; fastllm's fused blocks do not "
                "support retain_graph or double backward: load the model with patch=False for those"
            )
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        with no_autocast(dy.device.type):
            dx, grads = _backward_pass(ctx.block, ctx.call, dy, x, ctx.dtype, kept, ctx.backend, needs, rng=ctx.rng)
        return dx, None, None, *grads


def _forward_pass(
    block: VisionBlock, call: BlockCall, x: torch.Tensor, dtype: torch.dtype, *, keep_all: bool
) -> tuple[torch.Tensor, _Activations | None, str]:
    """(y, what a backward reads where it is kept, the attention kernel)"""
    weights = PreparedGroups(block, dtype, rows=x.numel() // x.shape[-1], shared=False)
    state = _activations(block, call, weights, x, dtype, needs_backward=keep_all)
    y = _finish(block, weights, state, keep=keep_all).view(x.shape)
    return y, state if keep_all else None, state.attention.backend


def _backward_pass(
    block: VisionBlock,
    call: BlockCall,
    dy: torch.Tensor,
    x: torch.Tensor,
    dtype: torch.dtype,
    state: _Activations | None,
    backend: str,
    needs: Sequence[bool],
    *,
    rng: torch.Tensor | None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of x and of `block.parameters()`, where `needs` asks for them. Without `state` the forward from x runs
    again: with the same attention kernel and random numbers."""
    weights = PreparedGroups(block, dtype, rows=dy.numel() // dy.shape[-1], shared=state is None)
    is_fresh = state is None
    if state is None:
        with replayed(rng, x.device):
            state = _activations(block, call, weights, x, dtype, needs_backward=True, backend=backend)
            # Down's masks come after every other random number of the block.
            assert state.up is not None
            state.down_masks = dropout_masks(block.down, state.up[:, : block.down.in_features])
    dx, grads = _backward(
        block, call, weights, state, rows_of(dy), tuple(needs[1:]), dtype, needs_dx=needs[0], overwrite=is_fresh
    )
    return None if dx is None else dx.view(x.shape), grads


def _activations(
    block: VisionBlock,
    call: BlockCall,
    weights: PreparedGroups,
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    needs_backward: bool,
    backend: str | None = None,
) -> _Activations:
    """The forward up to the MLP's first projection. `backend` repeats the attention kernel of an earlier run."""
    rows = rows_of(x)

    extended = block.qkv.input_buffer(rows, dtype)
    hidden = extended[:, : block.qkv.in_features]
    _, statistics1 = _normed(block.norm1, rows, out=hidden)
    qkv, qkv_low_rank, qkv_masks = project(weights.take("qkv"), hidden, extended=extended)
    qkv_low_rank = _detached_copy(qkv_low_rank, needs_backward)
    del extended, hidden

    q, k, v = _heads(block, qkv, _batch_of(x))
    if call.cos is not None and call.sin is not None:
        rope_apply(q, k, call.cos, call.sin, q, k)
    backend = backend or call.choose_backend(q, k, v, call.attention)
    attended = attention_forward(q, k, v, call.attention, backend, needs_backward=needs_backward)

    projected, output_low_rank, output_masks = project(weights.take("output"), attended.rows)
    extended = block.up.input_buffer(rows, dtype)
    hidden = extended[:, : block.up.in_features]
    middle, statistics2 = _normed(block.norm2, rows, residual=projected.to(rows.dtype), out=hidden)
    del projected
    # The spare columns let the backward overlay the gradient of this projection's output on its values.
    up = block.up.output_buffer(rows, dtype)
    _, up_low_rank, up_masks = project(
        weights.take("up"), hidden, extended=extended, out=up[:, : block.up.out_features]
    )
    return _Activations(
        x=rows, statistics1=statistics1, qkv=qkv, qkv_low_rank=qkv_low_rank, qkv_masks=qkv_masks, attention=attended,
        output_low_rank=output_low_rank, output_masks=output_masks, middle=middle, statistics2=statistics2,
        up=up, up_low_rank=_detached_copy(up_low_rank, needs_backward), up_masks=up_masks,
    )  # fmt: skip


def _finish(block: VisionBlock, weights: PreparedGroups, state: _Activations, *, keep: bool) -> torch.Tensor:
    """The rest of the forward: rows y [T, D]."""
    assert state.up is not None
    extended = block.down.input_buffer(state.x, state.up.dtype)
    hidden = extended[:, : block.down.in_features]
    parts = _parts_of_up(block, state.up)
    if block.is_gated:
        glu_forward(parts[0], parts[1], block.activation, out=hidden)
    else:
        activation_forward(parts[0], block.activation, out=hidden)
    y, low_rank, masks = project(weights.take("down"), hidden, extended=extended)
    if keep:
        state.down_low_rank, state.down_masks = _detached_copy(low_rank, True), masks
    return y.to(state.middle.dtype).add_(state.middle)


def _backward(
    block: VisionBlock,
    call: BlockCall,
    weights: PreparedGroups,
    state: _Activations,
    dy: torch.Tensor,
    needs: tuple[bool, ...],
    dtype: torch.dtype,
    *,
    needs_dx: bool,
    overwrite: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of x and of `block.parameters()`. With `overwrite` the MLP's activations may be overwritten."""
    needs_norm1, needs_norm2, needs_group = _split_needs(block, needs)

    up, state.up = state.up, None
    assert up is not None
    prepared = weights.take("down")
    extended = block.down.output_buffer(dy, dtype)
    dy_rows = copy_rows(extended[:, : block.down.out_features], dy)
    hidden, dy_low_rank = input_grad(prepared, dy_rows, state.down_masks, extended=extended)
    assert hidden is not None
    dup_extended = up if overwrite else block.up.output_buffer(dy, dtype)
    parts, dparts = _parts_of_up(block, up), _parts_of_up(block, dup_extended)
    # Either reads the gradient of down's input from `hidden` and leaves that input there.
    if block.is_gated:
        glu_backward(hidden, parts[0], parts[1], block.activation, dparts[0], dparts[1], h_out=hidden)
    else:
        activation_backward(hidden, parts[0], block.activation, dparts[0], y_out=hidden)
    low_rank = state.down_low_rank
    if low_rank is None and needs_group[3][3]:
        low_rank = low_rank_input(prepared, hidden, state.down_masks)
    down_grads = parameter_grads(prepared, dy_rows, dy_low_rank, hidden, low_rank, state.down_masks, needs_group[3])
    del prepared, hidden, extended, dy_rows, dy_low_rank, up, parts, dparts

    dup = dup_extended[:, : block.up.out_features]
    prepared = weights.take("up")
    dhidden, dy_low_rank = input_grad(prepared, dup, state.up_masks, extended=dup_extended)
    assert dhidden is not None
    hidden = torch.empty(state.middle.shape, dtype=dtype, device=dy.device)
    _normed(block.norm2, state.middle, out=hidden)
    up_grads = parameter_grads(prepared, dup, dy_low_rank, hidden, state.up_low_rank, state.up_masks, needs_group[2])
    del prepared, dup, dup_extended, hidden, dy_low_rank

    same_dtype = state.middle.dtype == dtype
    extended = block.output.output_buffer(dy, dtype)
    dmiddle_rows = extended[:, : block.output.out_features]
    dmiddle, norm2_grads = _normed_backward(
        block.norm2, dhidden, state.middle, state.statistics2, needs_norm2, residual_grad=dy,
        out=dmiddle_rows if same_dtype else None,
    )  # fmt: skip
    if not same_dtype:
        copy_rows(dmiddle_rows, dmiddle)
    del dhidden

    result = state.attention
    batch, length = result.out.shape[0], result.out.shape[2]
    out_rows = result.rows
    prepared = weights.take("output")
    dout, dy_low_rank = input_grad(prepared, dmiddle_rows, state.output_masks, extended=extended)
    assert dout is not None
    output_grads = parameter_grads(
        prepared, dmiddle_rows, dy_low_rank, out_rows, state.output_low_rank, state.output_masks, needs_group[1]
    )
    dout = dout.unflatten(-1, (-1, block.head_dim)).unflatten(0, (batch, length)).transpose(1, 2)
    dq, dk, dv = attention_backward(result, dout, *_heads(block, state.qkv, batch), call.attention)
    del prepared, dout, out_rows

    dqkv_extended = block.qkv.output_buffer(dy, dtype)
    dqkv = dqkv_extended[:, : block.qkv.out_features]
    dq_rows, dk_rows, dv_rows = _heads(block, dqkv, batch)
    if call.cos is not None and call.sin is not None:
        rope_apply(_unit_stride(dq), _unit_stride(dk), call.cos, call.sin, dq_rows, dk_rows, inverse=True)
    else:
        dq_rows.copy_(dq)
        dk_rows.copy_(dk)
    dv_rows.copy_(dv)
    del dq, dk, dv

    prepared = weights.take("qkv")
    needs_dhidden = needs_dx or any(needs_norm1)
    dhidden, dy_low_rank = input_grad(
        prepared, dqkv, state.qkv_masks, extended=dqkv_extended, needs_dx=needs_dhidden
    )  # fmt: skip
    hidden = torch.empty(state.x.shape, dtype=dtype, device=dy.device)
    _normed(block.norm1, state.x, out=hidden)
    qkv_grads = parameter_grads(
        prepared, dqkv, dy_low_rank, hidden, state.qkv_low_rank, state.qkv_masks, needs_group[0]
    )
    dx, norm1_grads = None, [None] * _PARAMETERS_PER_NORM
    if dhidden is not None:
        dx, norm1_grads = _normed_backward(
            block.norm1, dhidden, state.x, state.statistics1, needs_norm1, residual_grad=dmiddle
        )
    grads = [*norm1_grads, *norm2_grads, *qkv_grads, *output_grads, *up_grads, *down_grads]
    return dx if needs_dx else None, grads


def _normed(
    norm: LayerNorm | Norm, rows: torch.Tensor, *, residual: torch.Tensor | None = None, out: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Write the norm of rows (plus residual) into `out`. Returns: (what was normalised, statistics for a backward)."""
    if isinstance(norm, LayerNorm):
        _, total, mean, rstd = layer_norm_forward(rows, norm.weight, norm.bias, norm.eps, residual=residual, out=out)
        return total, (mean, rstd)
    _, total, rstd = rms_norm_forward(rows, norm.weight, norm.eps, offset=norm.offset, residual=residual, out=out)
    return total, (rstd,)


def _normed_backward(
    norm: LayerNorm | Norm,
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: tuple[torch.Tensor, ...],
    needs: tuple[bool, ...],
    *,
    residual_grad: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """(dx, gradients of weight and bias where `needs` says so)."""
    db = None
    if isinstance(norm, LayerNorm):
        mean, rstd = statistics
        dx, dw, db = layer_norm_backward(
            dy, x, norm.weight, mean, rstd, norm.eps, residual_grad=residual_grad, out=out,
            needs_parameter_grads=any(needs),
        )  # fmt: skip
    else:
        dx, dw = rms_norm_backward(
            dy, x, norm.weight, statistics[0], norm.eps, offset=norm.offset, residual_grad=residual_grad, out=out,
            needs_weight_grad=needs[0],
        )  # fmt: skip
    return dx, [
        grad.to(norm.weight.dtype) if grad is not None and needed else None
        for grad, needed in zip((dw, db), needs, strict=True)
    ]


def _split_needs(
    block: VisionBlock, needs: tuple[bool, ...]
) -> tuple[tuple[bool, ...], tuple[bool, ...], list[tuple[bool, ...]]]:
    """`needs` of `block.parameters()` as (norm1, norm2, one tuple a group)."""
    groups, start = [], 2 * _PARAMETERS_PER_NORM
    for group in block.groups():
        end = start + PARAMETERS_PER_PROJECTION * len(group.projections)
        groups.append(needs[start:end])
        start = end
    return needs[:_PARAMETERS_PER_NORM], needs[_PARAMETERS_PER_NORM : 2 * _PARAMETERS_PER_NORM], groups


def _parts_of_up(block: VisionBlock, joined: torch.Tensor) -> list[torch.Tensor]:
    return [joined[:, columns] for columns in block.up.row_slices]


def _heads(block: VisionBlock, qkv: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Joined rows as q, k, v [B, heads, S, head_dim], views."""
    length = qkv.shape[0] // max(batch, 1)
    heads = qkv.unflatten(-1, (3, -1, block.head_dim)).unflatten(0, (batch, length))
    q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
    return q, k, v


def _batch_of(x: torch.Tensor) -> int:
    return x.shape[0] if x.dim() == 3 else 1


def _detached_copy(view: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    """A copy of a narrow column view, so that its wide buffer can be freed; None where nobody will read it."""
    return view.clone() if wanted and view is not None else None


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

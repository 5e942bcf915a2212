"""A whole pre-norm decoder layer as one autograd node with a hand-written backward.

    a = x + o(attention(rope(qkv(norm1(x)))))          y = a + down(act(gate(norm2(a))) * up(norm2(a)))

Where the family has them, o's and down's outputs pass a norm of their own before they are added (Gemma 2 and 3).

What this buys over a graph of small nodes: the backward keeps only what it needs (act(gate) * up is recomputed in one
pass, norm outputs only for weights that are trained, down's output only where a norm reads it), recomputation shares
dequantised weights with the backward that follows it, host time falls, and each layer has one knob, `Keep`, for the
memory planner.

Shapes: x, y [B, S, D]; inside, rows [T, D] with T = B * S. Heads as [B, heads, S, head_dim].
Dtypes: the residual stream keeps x's dtype; matrix products run in the compute dtype (autocast's, else the weights').
Source: Touvron et al., "LLaMA", arXiv 2302.13971, section 2.2; norms of query and key heads: Qwen3; norms of both
outputs: Gemma Team, "Gemma 2", arXiv 2408.00118, section 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .attention import attention_backward, attention_forward
from .decoder_activations import Activations, Offload
from .decoder_glu import down_input, down_input_backward
from .dispatch import compute_dtype, no_autocast, rows_of
from .gradient_room import with_room
from .layer_definition import NORMS, DecoderLayer, Keep, LayerCall, Norm
from .lora import (
    PARAMETERS_PER_PROJECTION,
    PreparedGroups,
    draws_masks,
    dropout_masks,
    input_grad,
    low_rank_input,
    parameter_grads,
    project,
)
from .normed_input import normed_parameter_grads
from .random_state import random_state, replayed
from .rms_norm import rms_norm_backward, rms_norm_forward
from .rope import rope_apply
from .row_copy import copy_rows


def decoder_layer(x: torch.Tensor, layer: DecoderLayer, call: LayerCall) -> torch.Tensor:
    """The layer under autograd: gradients for x and for every trainable tensor of `layer.parameters()`."""
    return _DecoderLayer.apply(x, layer, call, *layer.parameters())


@dataclass(frozen=True, slots=True, eq=False)
class DecoderPass:
    """The layer outside autograd, in one compute dtype and without random numbers, as recorded_pass.py wants it."""

    layer: DecoderLayer
    dtype: torch.dtype

    def forward(self, x: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, Activations | None, str]:
        return _forward_pass(self.layer, call, x, self.dtype, call.keep)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, call: LayerCall, kept: Activations | None, backend: str,
        needs: Sequence[bool],
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:  # fmt: skip
        # A recording is replayed: what it keeps has to be there again.
        return _backward_pass(
            self.layer, call, dy, lambda: x, self.dtype, kept, backend, needs, rng=None, overwrites_kept=False
        )


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer, call, *parameters):
        ctx.layer, ctx.call, ctx.dtype = layer, call, compute_dtype(x, layer.qkv.dtype)
        keep = call.keep if any(ctx.needs_input_grad) else None
        draws = call.attention.dropout > 0 or draws_masks(layer)
        ctx.rng = random_state(x.device) if keep not in (None, Keep.ALL) and draws else None
        with no_autocast(x.device.type):
            y, ctx.kept, ctx.backend = _forward_pass(layer, call, x, ctx.dtype, None if ctx.rng is not None else keep)
        ctx.fetch = None
        if keep is not None and keep.is_offloaded:
            if ctx.kept is None:
                assert call.offload is not None
                (ctx.fetch,) = call.offload([x])
            ctx.save_for_backward(*parameters)
        else:
            ctx.save_for_backward(*parameters, x)
        return y

    @staticmethod
    def backward(ctx, dy):
        saved, fetch, kept = ctx.saved_tensors, ctx.fetch, ctx.kept
        ctx.kept = ctx.fetch = None
        if kept is None and fetch is None and ctx.call.keep is not Keep.INPUT:
            raise RuntimeError(
                "the activations of this decoder layer were freed by an earlier backward; fastllm's fused layers do "
                "not support retain_graph or double backward: load the model with patch=False for those"
            )
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        with no_autocast(dy.device.type):
            dx, grads = _backward_pass(
                ctx.layer, ctx.call, dy, fetch or (lambda: saved[-1]), ctx.dtype, kept, ctx.backend, needs, rng=ctx.rng,
                overwrites_kept=True,
            )  # fmt: skip
        return dx, None, None, *grads


def _forward_pass(
    layer: DecoderLayer, call: LayerCall, x: torch.Tensor, dtype: torch.dtype, keep: Keep | None
) -> tuple[torch.Tensor, Activations | None, str]:
    """(y, what a backward reads where it is kept, here or in host memory; the attention kernel)"""
    rows, in_turn = x.shape[0] * x.shape[1], call.frees_weights
    weights = PreparedGroups(layer, dtype, call.kept_weights, rows=rows, shared=False, in_turn=in_turn)
    keep_all, offload = keep is Keep.ALL, call.offload if keep is Keep.OFFLOADED_ATTENTION else None
    state = _activations(layer, call, weights, x, dtype, needs_backward=keep_all, offload=offload)
    y = _mlp_output(layer, weights, state, keep=keep_all).add_(state.middle).view(x.shape)
    if state.is_away:
        state.let_go()
    return y, state if keep_all or state.is_away else None, state.attention.backend


def _backward_pass(
    layer: DecoderLayer,
    call: LayerCall,
    dy: torch.Tensor,
    fetch: Callable[[], torch.Tensor],
    dtype: torch.dtype,
    state: Activations | None,
    backend: str,
    needs: Sequence[bool],
    *,
    rng: torch.Tensor | None,
    overwrites_kept: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of x and of `layer.parameters()`, where `needs` asks for them. Without `state` the forward from
    `fetch()`, its input, runs again: with the same attention kernel and random numbers; with a state that is away, its
    second half does. `overwrites_kept`: gradients may take the place of what a state that stayed holds."""
    is_away = state is not None and state.is_away
    is_fresh = state is None or is_away
    # With the attention half away, only gate and up's weights would be dequantised twice.
    is_shared = is_fresh and (is_away or not call.frees_weights)
    rows, in_turn = dy.shape[0] * dy.shape[1], call.frees_weights
    weights = PreparedGroups(layer, dtype, call.kept_weights, rows=rows, shared=is_shared, in_turn=in_turn)
    if is_fresh:
        with replayed(rng, dy.device):
            state = _activations_again(layer, call, weights, state, fetch, dtype, backend)
    assert state is not None
    dx, grads = _backward(
        layer, call, weights, state, rows_of(dy), tuple(needs[1:]), dtype, needs_dx=needs[0],
        overwrite=is_fresh or overwrites_kept,
    )  # fmt: skip
    return None if dx is None else dx.view(dy.shape), grads


def _activations_again(
    layer: DecoderLayer,
    call: LayerCall,
    weights: PreparedGroups,
    state: Activations | None,
    fetch: Callable[[], torch.Tensor],
    dtype: torch.dtype,
    backend: str,
) -> Activations:
    """What the forward had and did not keep: all of it, or the second half of a state whose first is away."""
    if state is None:
        state = _activations(layer, call, weights, fetch(), dtype, needs_backward=True, backend=backend)
    else:
        state.start_rows_back()
        state.bring_back_middle()
        mlp_input, _, _ = _mlp_input(layer, state.middle, dtype)
        _add_gate_up(layer, weights, state, mlp_input, needs_backward=True)
    # Down's masks come after every other random number of the layer.
    if layer.mlp_out_norm is not None:
        _mlp_output(layer, weights, state, keep=True)
    else:
        gate, _ = layer.split_gate_up(state.gate_up)
        state.down_masks = dropout_masks(layer.down, gate)
    return state


def _activations(
    layer: DecoderLayer,
    call: LayerCall,
    weights: PreparedGroups,
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    needs_backward: bool,
    backend: str | None = None,
    offload: Offload | None = None,
) -> Activations:
    """The forward up to gate and up. `backend` repeats the attention kernel of an earlier run; `offload` takes the
    attention half, unless autograd's graph has a hold of it."""
    rows = rows_of(x)
    batch, length = x.shape[:2]

    extended = layer.qkv.input_buffer(rows, dtype)
    hidden = extended[:, : layer.qkv.in_features]
    norm = layer.input_norm
    _, _, input_rstd = rms_norm_forward(rows, norm.weight, norm.eps, offset=norm.offset, out=hidden)
    qkv, qkv_low_rank, qkv_masks = project(weights.take("qkv"), hidden, extended=extended)
    qkv_low_rank = _detached_copy(qkv_low_rank, needs_backward or offload is not None)
    del extended, hidden

    qkv_raw, query_rstd, key_rstd = qkv, None, None
    if layer.query_norm is not None and layer.key_norm is not None:
        qkv, query_rstd, key_rstd = _norm_heads(layer, qkv)
    q, k, v = layer.split_heads(qkv, batch, length)
    rope_apply(q, k, call.cos, call.sin, q, k)
    backend = backend or call.choose_backend(q, k, v, call.attention)
    offload = None if backend == "autograd" else offload
    is_kept = needs_backward or offload is not None
    attended = attention_forward(q, k, v, call.attention, backend, needs_backward=is_kept)

    projected, output_low_rank, output_masks = project(weights.take("output"), attended.rows)
    attention_out, attention_out_rstd = None, None
    if layer.attention_out_norm is not None:
        attention_out = projected
        projected, attention_out_rstd = _normed(attention_out, layer.attention_out_norm, rows.dtype)
    mlp_input, middle, middle_rstd = _mlp_input(layer, rows, dtype, residual=projected.to(rows.dtype))
    del projected
    state = Activations(
        x=rows, input_rstd=input_rstd, qkv_raw=qkv_raw if query_rstd is not None else None, query_rstd=query_rstd,
        key_rstd=key_rstd, qkv=qkv, qkv_low_rank=qkv_low_rank, qkv_masks=qkv_masks, attention=attended,
        output_low_rank=output_low_rank, output_masks=output_masks, attention_out=attention_out,
        attention_out_rstd=attention_out_rstd, middle=middle, middle_rstd=middle_rstd,
    )  # fmt: skip
    if offload is not None:
        state.send_away(offload)
    _add_gate_up(layer, weights, state, mlp_input, needs_backward=needs_backward)
    if offload is not None and call.rows_away is not None:
        state.send_rows_away(call.rows_away)
    return state


def _mlp_input(
    layer: DecoderLayer, rows: torch.Tensor, dtype: torch.dtype, *, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the second norm's output in the buffer of gate and up's product, rows plus `residual`, which is what it takes,
    and their rstd)"""
    norm = layer.post_norm
    extended = layer.gate_up.input_buffer(rows, dtype)
    _, total, rstd = rms_norm_forward(
        rows, norm.weight, norm.eps, offset=norm.offset, residual=residual,
        out=extended[:, : layer.gate_up.in_features],
    )  # fmt: skip
    return extended, total, rstd


def _add_gate_up(
    layer: DecoderLayer,
    weights: PreparedGroups,
    state: Activations,
    extended: torch.Tensor,
    *,
    needs_backward: bool,
) -> None:
    """The output of gate and up, but for rows that are on their way back from the host."""
    group, prepared, away, known = layer.gate_up, weights.take("gate_up"), state.rows_away, None
    if state.gate_up is None:
        # The spare columns let the backward overlay the gradient of gate and up on their values.
        state.gate_up = group.output_buffer(extended, extended.dtype)
    hidden, beside = extended[:, : group.in_features], extended[:, group.in_features :]
    if away:
        known = low_rank_input(prepared, hidden, (), out=None if group.is_fp8 else beside)
    _, low_rank, state.gate_up_masks = project(
        prepared, hidden[away:], extended=extended[away:], out=state.gate_up[away:, : group.out_features],
        low_rank=None if known is None else known[away:],
    )  # fmt: skip
    state.gate_up_low_rank = _detached_copy(low_rank if known is None else known, needs_backward)


def _mlp_output(layer: DecoderLayer, weights: PreparedGroups, state: Activations, *, keep: bool) -> torch.Tensor:
    """Rows [T, D] that the MLP adds to the residual stream, in its dtype."""
    assert state.gate_up is not None
    state.await_rows()
    prepared = weights.take("down")
    extended = layer.down.input_buffer(state.gate_up, state.gate_up.dtype)
    known = down_input(layer, state, prepared.a, extended=extended)
    hidden = extended[:, : layer.down.in_features]
    out, low_rank, masks = project(prepared, hidden, extended=extended, low_rank=known)
    if keep or state.is_away:
        state.down_low_rank, state.down_masks = _detached_copy(low_rank, True), masks
    if layer.mlp_out_norm is None:
        return out.to(state.middle.dtype)
    normed, rstd = _normed(out, layer.mlp_out_norm, state.middle.dtype)
    if keep:
        state.mlp_out, state.mlp_out_rstd = out, rstd
    return normed


def _backward(
    layer: DecoderLayer,
    call: LayerCall,
    weights: PreparedGroups,
    state: Activations,
    dy: torch.Tensor,
    needs: tuple[bool, ...],
    dtype: torch.dtype,
    *,
    needs_dx: bool,
    overwrite: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of x and of `layer.parameters()`. With `overwrite` gate and up may be overwritten."""
    needs_norm, needs_group = _split_needs(layer, needs)
    norm_grads: dict[str, torch.Tensor | None] = dict.fromkeys(NORMS)

    gate_up, state.gate_up = state.gate_up, None
    assert gate_up is not None
    if torch.are_deterministic_algorithms_enabled():
        state.down_low_rank = None  # a backward that makes it again sums in another order: where bits matter, all do
    prepared = weights.take("down", last=True)
    if layer.mlp_out_norm is None:
        extended = with_room(layer.down, dy, dtype, call.gradient_room)
    else:
        extended = layer.down.output_buffer(dy, dtype)
    dy_rows = extended[:, : layer.down.out_features]
    if layer.mlp_out_norm is not None:
        norm_grads["mlp_out_norm"] = _normed_backward(
            dy, state.mlp_out, state.mlp_out_rstd, layer.mlp_out_norm, dy_rows, needs_norm["mlp_out_norm"]
        )
        state.mlp_out = None
    hidden, dy_low_rank = input_grad(prepared, dy_rows, state.down_masks, extended=extended)
    assert hidden is not None
    dgate_up_extended = gate_up if overwrite else layer.gate_up.output_buffer(dy, dtype)
    dgate_up = dgate_up_extended[:, : layer.gate_up.out_features]
    state.await_rows()
    products = down_input_backward(
        layer, state, prepared.a, hidden, dy_low_rank, gate_up, dgate_up_extended, needs_group[3]
    )
    low_rank = state.down_low_rank if products.low_rank is None else products.low_rank
    if low_rank is None and needs_group[3][3]:
        low_rank = low_rank_input(prepared, hidden, state.down_masks)
    down_grads = parameter_grads(
        prepared, dy_rows, dy_low_rank, hidden, low_rank, state.down_masks, needs_group[3], stacked_da=products.da
    )
    del prepared, hidden, extended, dy_rows, dy_low_rank, gate_up

    norm = layer.post_norm
    prepared = weights.take("gate_up", last=True)
    dhidden, dy_low_rank = input_grad(
        prepared, dgate_up, state.gate_up_masks, extended=dgate_up_extended, dy_low_rank=products.dy_low_rank
    )
    assert dhidden is not None
    gate_up_grads = normed_parameter_grads(
        prepared, norm, state.middle, state.middle_rstd, dgate_up, dy_low_rank, state.gate_up_low_rank,
        state.gate_up_masks, needs_group[2], known_db=products.db,
    )  # fmt: skip
    del prepared, dgate_up, dgate_up_extended, dy_low_rank, products

    state.bring_back()
    in_place = state.middle.dtype == dtype and layer.attention_out_norm is None
    extended = layer.output.output_buffer(dy, dtype)
    dout_rows = extended[:, : layer.output.out_features]
    dmiddle, norm_grads["post_norm"] = rms_norm_backward(
        dhidden, state.middle, norm.weight, state.middle_rstd, norm.eps, offset=norm.offset, residual_grad=dy,
        out=dout_rows if in_place else None, needs_weight_grad=needs_norm["post_norm"],
    )  # fmt: skip
    if layer.attention_out_norm is not None:
        norm_grads["attention_out_norm"] = _normed_backward(
            dmiddle, state.attention_out, state.attention_out_rstd, layer.attention_out_norm, dout_rows,
            needs_norm["attention_out_norm"],
        )  # fmt: skip
        state.attention_out = None
    elif not in_place:
        copy_rows(dout_rows, dmiddle)
    del dhidden

    result, out_rows = state.attention, state.attention.rows
    prepared = weights.take("output", last=True)
    dout, dy_low_rank = input_grad(prepared, dout_rows, state.output_masks, extended=extended)
    assert dout is not None
    output_grads = parameter_grads(
        prepared, dout_rows, dy_low_rank, out_rows, state.output_low_rank, state.output_masks, needs_group[1]
    )
    batch, _, length, _ = result.out.shape
    q, k, v = layer.split_heads(state.qkv, batch, length)
    dout = dout.unflatten(-1, (-1, layer.head_dim)).unflatten(0, (batch, length)).transpose(1, 2)
    dq, dk, dv = attention_backward(result, dout, q, k, v, call.attention)
    del prepared, dout, out_rows, q, k, v

    dqkv_extended = layer.qkv.output_buffer(dy, dtype)
    dqkv = dqkv_extended[:, : layer.qkv.out_features]
    dq_rows, dk_rows, _ = layer.split_heads(dqkv, batch, length)
    rope_apply(_unit_stride(dq), _unit_stride(dk), call.cos, call.sin, dq_rows, dk_rows, inverse=True)
    copy_rows(dqkv[:, layer.qkv_columns[2]], dv.transpose(1, 2).flatten(2).flatten(0, 1))
    del dq, dk, dv
    if state.qkv_raw is not None:
        norm_grads |= _norm_heads_backward(layer, state, dqkv, needs_norm)

    norm = layer.input_norm
    prepared = weights.take("qkv", last=True)
    dhidden, dy_low_rank = input_grad(
        prepared, dqkv, state.qkv_masks, extended=dqkv_extended, needs_dx=needs_dx or needs_norm["input_norm"]
    )
    qkv_grads = normed_parameter_grads(
        prepared, norm, state.x, state.input_rstd, dqkv, dy_low_rank, state.qkv_low_rank, state.qkv_masks,
        needs_group[0],
    )  # fmt: skip
    dx = None
    if dhidden is not None:
        room = call.gradient_room if needs_dx else None
        # As the layer before is most likely to want it.
        if room is None:
            extended = layer.down.output_buffer(dy, state.x.dtype)
        else:
            extended = room.buffer(layer.down, dy, state.x.dtype)
        dx, norm_grads["input_norm"] = rms_norm_backward(
            dhidden, state.x, norm.weight, state.input_rstd, norm.eps, offset=norm.offset, residual_grad=dmiddle,
            out=extended[:, : layer.down.out_features], needs_weight_grad=needs_norm["input_norm"],
        )  # fmt: skip
        if room is not None:
            room.leave(extended)
    typed = []
    for name, norm in layer.norms().items():
        grad = norm_grads[name]
        typed.append(None if grad is None or norm is None else grad.to(norm.weight.dtype))
    return dx if needs_dx else None, [*typed, *qkv_grads, *output_grads, *gate_up_grads, *down_grads]


def _split_needs(layer: DecoderLayer, needs: tuple[bool, ...]) -> tuple[dict[str, bool], list[tuple[bool, ...]]]:
    """`needs` of `layer.parameters()` as (norms, one tuple a group)."""
    groups, start = [], len(NORMS)
    for group in layer.groups():
        end = start + PARAMETERS_PER_PROJECTION * len(group.projections)
        groups.append(needs[start:end])
        start = end
    return dict(zip(NORMS, needs[: len(NORMS)], strict=True)), groups


def _norm_heads(layer: DecoderLayer, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k of joined rows normalised per head, in a new buffer that also takes v."""
    normed = torch.empty_like(raw)
    rstds = []
    for columns, norm in zip(layer.qkv_columns[:2], (layer.query_norm, layer.key_norm), strict=True):
        assert norm is not None
        source = raw[:, columns].reshape(-1, layer.head_dim)
        out, _, rstd = rms_norm_forward(source, norm.weight, norm.eps, offset=norm.offset)
        normed[:, columns] = out.view(raw.shape[0], -1)
        rstds.append(rstd)
    value_columns = layer.qkv_columns[2]
    normed[:, value_columns] = raw[:, value_columns]
    return normed, rstds[0], rstds[1]


def _norm_heads_backward(
    layer: DecoderLayer, state: Activations, dqkv: torch.Tensor, needs_norm: dict[str, bool]
) -> dict[str, torch.Tensor | None]:
    """Turn the gradients of the normalised q and k, inside `dqkv`, into those of the raw ones. Returns the weights'."""
    assert state.qkv_raw is not None and state.query_rstd is not None and state.key_rstd is not None
    grads = {}
    for columns, name, rstd in zip(
        layer.qkv_columns[:2], ("query_norm", "key_norm"), (state.query_rstd, state.key_rstd), strict=True
    ):
        norm: Norm = getattr(layer, name)
        source = state.qkv_raw[:, columns].reshape(-1, layer.head_dim)
        upstream = dqkv[:, columns].reshape(-1, layer.head_dim)
        grad, grads[name] = rms_norm_backward(
            upstream, source, norm.weight, rstd, norm.eps, offset=norm.offset, needs_weight_grad=needs_norm[name]
        )
        dqkv[:, columns] = grad.view(dqkv.shape[0], -1)
    return grads


def _normed(rows: torch.Tensor, norm: Norm, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows normalised, in `dtype`; their rstd)."""
    out, _, rstd = rms_norm_forward(rows, norm.weight, norm.eps, offset=norm.offset, out=_empty_rows(rows, dtype))
    return out, rstd


def _normed_backward(
    upstream: torch.Tensor,
    rows: torch.Tensor | None,
    rstd: torch.Tensor | None,
    norm: Norm,
    out: torch.Tensor,
    needs_weight_grad: bool,
) -> torch.Tensor | None:
    """Writes the gradient of rows that `_normed` took to `out`. Returns the weight's."""
    assert rows is not None and rstd is not None
    _, weight_grad = rms_norm_backward(
        upstream, rows, norm.weight, rstd, norm.eps, offset=norm.offset, out=out, needs_weight_grad=needs_weight_grad
    )
    return weight_grad


def _detached_copy(view: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    """A narrow matrix apart from the wide buffer that it is a view of, if any; None where nobody will read it."""
    return view.contiguous() if wanted and view is not None else None


def _empty_rows(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

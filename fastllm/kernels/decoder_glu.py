"""What a decoder layer's MLP computes between its two products, h = act(gate) * up, by the kernel that suits both:
plain, or forward and backward with what LoRA makes of it.

Shapes: gate and up side by side [T, 2F]; h, down's input, [T, F].  Dtypes: the compute dtype.
"""

import torch

from .decoder_activations import Activations
from .glu import glu_backward, glu_forward
from .glu_lora_backward import LoraProducts, glu_backward_between, serves_groups
from .glu_lora_forward import glu_lora_forward, serves_rank
from .layer_definition import DecoderLayer

# Rows from which the kernels that make LoRA's products as well are the faster ones on a GPU.
_LEAST_ROWS = 4096


def down_input(
    layer: DecoderLayer, state: Activations, down_a: torch.Tensor | None, *, extended: torch.Tensor
) -> torch.Tensor | None:
    """Write h `[T, F]` of `state.gate_up` to the left part of `extended`, the buffer of `down.input_buffer`. Returns
    h A^T `[T, E]` where that was made with it: its right part, if it has one. `down_a [E, F]` is the A of down, if it
    has one."""
    down = layer.down
    gate, up = layer.split_gate_up(state.gate_up)
    out = extended[:, : down.in_features]
    rank = down.projections[0].rank
    if down_a is not None and not down.has_dropout and _is_long(out) and serves_rank(rank, out):
        low_rank = out.new_empty(out.shape[0], down.extension) if down.is_fp8 else extended[:, down.in_features :]
        glu_lora_forward(gate, up, layer.activation, down_a, rank, out=out, low_rank=low_rank)
        return low_rank
    glu_forward(gate, up, layer.activation, out=out)
    return None


def down_input_backward(
    layer: DecoderLayer,
    state: Activations,
    down_a: torch.Tensor | None,
    hidden: torch.Tensor,
    dy_low_rank: torch.Tensor | None,
    gate_up: torch.Tensor,
    dgate_up: torch.Tensor,
    needs_down: tuple[bool, ...],
) -> LoraProducts:
    """Write the gradient of gate and up into the first columns of `dgate_up`, which may be `gate_up`, from that of h in
    `hidden`. Leaves h there, unless what `needs_down`, of down's parameters, makes of it is among the products.

    `down_a [E, F]` and `dy_low_rank [T, E]` are the A and the dY B of down, None without adapter.
    """
    needs_weight, _, _, needs_b = needs_down
    if _is_long(hidden) and not needs_weight and serves_groups(layer.gate_up, layer.down, hidden):
        return glu_backward_between(
            layer.gate_up, layer.down, hidden, gate_up, dgate_up, layer.activation, low_rank=state.gate_up_low_rank,
            down_dy_low_rank=dy_low_rank, down_a=down_a, needs_down_low_rank=needs_b and state.down_low_rank is None,
        )  # fmt: skip
    values, grads = layer.split_gate_up(gate_up), layer.split_gate_up(dgate_up)
    glu_backward(hidden, *values, layer.activation, *grads, h_out=hidden)
    return LoraProducts()


def _is_long(rows: torch.Tensor) -> bool:
    return rows.shape[0] >= _LEAST_ROWS or not rows.is_cuda

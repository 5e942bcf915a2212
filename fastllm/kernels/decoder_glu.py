"""What a decoder layer's MLP computes between its two products, h = act(gate) * up, by the kernel that suits both:
plain, with LoRA's term where the products lack it, and backward with all that LoRA makes of it.

Shapes: gate and up side by side [T, 2F]; h, down's input, [T, F].  Dtypes: the compute dtype.
"""

import torch

from .decoder_activations import Activations
from .glu import glu_backward, glu_forward
from .glu_lora_backward import LoraProducts, glu_backward_between, serves_groups
from .layer_definition import DecoderLayer
from .low_rank_glu import LowRankTerm, input_term, low_rank_glu_backward, low_rank_glu_forward, output_term

# Rows from which the kernel that makes LoRA's products as well is the faster one on a GPU.
_LEAST_ROWS = 4096


def down_input(layer: DecoderLayer, state: Activations, *, out: torch.Tensor) -> None:
    """Write h `[T, F]` of `state.gate_up` to `out`."""
    gate, up = layer.split_gate_up(state.gate_up)
    if layer.gate_up.has_separate_term:
        low_rank_glu_forward(gate, up, layer.activation, *_terms_of_gate_and_up(layer, state), out=out)
    else:
        glu_forward(gate, up, layer.activation, out=out)


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
    is_long = hidden.shape[0] >= _LEAST_ROWS or not hidden.is_cuda
    if is_long and not needs_weight and serves_groups(layer.gate_up, layer.down, hidden):
        # Sums in another order than the forward's: where bits matter, every way to keep activations makes them here.
        is_unknown = state.down_low_rank is None or torch.are_deterministic_algorithms_enabled()
        return glu_backward_between(
            layer.gate_up, layer.down, hidden, gate_up, dgate_up, layer.activation, low_rank=state.gate_up_low_rank,
            down_dy_low_rank=dy_low_rank, down_a=down_a, needs_down_low_rank=needs_b and is_unknown,
        )  # fmt: skip
    values, grads = layer.split_gate_up(gate_up), layer.split_gate_up(dgate_up)
    if layer.gate_up.has_separate_term or layer.down.has_separate_term:
        terms = _term_of_hidden(layer, dy_low_rank), *_terms_of_gate_and_up(layer, state)
        low_rank_glu_backward(hidden, *values, layer.activation, *terms, *grads, h_out=hidden)
    else:
        glu_backward(hidden, *values, layer.activation, *grads, h_out=hidden)
    return LoraProducts()


def _terms_of_gate_and_up(layer: DecoderLayer, state: Activations) -> tuple[LowRankTerm | None, LowRankTerm | None]:
    """What LoRA adds to `state.gate_up`, where it was left out."""
    if not layer.gate_up.has_separate_term or state.gate_up_low_rank is None:
        return None, None
    gate_columns, up_columns = layer.gate_up_columns
    low_rank = state.gate_up_low_rank
    return output_term(layer.gate_up, low_rank, gate_columns), output_term(layer.gate_up, low_rank, up_columns)


def _term_of_hidden(layer: DecoderLayer, dy_low_rank: torch.Tensor | None) -> LowRankTerm | None:
    """What LoRA adds to the gradient of down's input, where it was left out."""
    if not layer.down.has_separate_term or dy_low_rank is None:
        return None
    return input_term(layer.down, dy_low_rank)

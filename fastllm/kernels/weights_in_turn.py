"""The 4-bit weights of a group, dequantised piece after piece into one buffer.

Joined, all of them are there at once: the matrices of an MLP are the largest of a model, and of a short batch, whose
activations are small, they are most of what a layer takes. In turn they take as much as the largest piece. The forward
is the extended product of each, with the same result; the gradients of the input, one for each piece, are added up in
fp32.

Shapes: x [T, K], pieces of the weights W [N, K] by rows, B [N, E].  Dtypes: the compute dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .nf4 import Nf4Weight, dequantize_nf4
from .projections import ProjectionGroup
from .row_copy import copy_rows

# Values of a piece at most: in 16 bits 64 MiB, as much as a chunk of logits takes where memory counts.
_MOST_VALUES = 2**25


@dataclass(frozen=True, slots=True, eq=False)
class WeightsInTurn:
    """(columns of y, [W | B] `[n, K + E]` of these) of each piece. `b` [N, E] is None for a group without LoRA.

    A matrix lasts until the next one is asked for, and their buffer no longer than the loop that asks.
    """

    group: ProjectionGroup
    dtype: torch.dtype
    b: torch.Tensor | None

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        group = self.group
        buffer = group.weight_buffer(_most_rows(group), self.dtype)
        for place, projection in zip(group.row_slices, group.projections, strict=True):
            assert isinstance(projection.weight, Nf4Weight)
            for piece in _pieces(projection.weight):
                rows = slice(place.start + piece.start, place.start + piece.stop)
                matrix = buffer[: piece.stop - piece.start]
                dequantize_nf4(projection.weight.rows(piece), self.dtype, out=matrix[:, : group.in_features])
                if self.b is not None:
                    copy_rows(matrix[:, group.in_features :], self.b[rows])
                yield rows, matrix


def spares_memory_in_turn(group: ProjectionGroup, rows: int) -> bool:
    """Whether inputs of so many rows leave a quarter or more of what joined weights and the gradient of the input take:
    the fp32 sum of that, beside a piece or its rounded copy. Not where the sum is wider than the weights.

    In deterministic mode none is: sums in another order would not be the bits of a plan with more memory.
    """
    if torch.are_deterministic_algorithms_enabled() or group.is_fp8 or not group.is_packed:
        return False
    # Bytes for each of K.
    joined, in_turn = 2 * (group.out_features + rows), max(2 * _most_rows(group) + 4 * rows, 6 * rows)
    return 6 * rows < group.out_features and 4 * in_turn <= 3 * joined


def _pieces(weight: Nf4Weight) -> list[slice]:
    """Rows of about as many values, at most `_MOST_VALUES` where they can be cut so."""
    rows, columns = weight.shape
    count, apart = -(-rows * columns // _MOST_VALUES), weight.rows_apart
    if count == 1 or not apart:
        return [slice(0, rows)]
    step = -(-rows // (count * apart)) * apart
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _most_rows(group: ProjectionGroup) -> int:
    weights = (projection.weight for projection in group.projections)
    return max(piece.stop - piece.start for w in weights if isinstance(w, Nf4Weight) for piece in _pieces(w))

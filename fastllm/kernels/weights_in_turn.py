"""The 4-bit weights of a group, dequantised one after the other into one buffer.

Joined, all of them are there at once: gate and up are the largest matrices of a model, and of a short batch, whose
activations are small, they are most of what a layer takes. In turn they take half of that. The forward is the extended
product of each, with the same result; the gradients of the input, one for each weight, are added up in fp32.

Shapes: x [T, K], W_i [N_i, K], B [N, E] with N the sum of N_i.  Dtypes: the compute dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .nf4 import Nf4Weight, dequantize_nf4
from .projections import ProjectionGroup
from .row_copy import copy_rows


@dataclass(frozen=True, slots=True, eq=False)
class WeightsInTurn:
    """(columns of y, [W_i | B's rows] `[N_i, K + E]`) of each projection. `b` [N, E] is None for a group without LoRA.

    A matrix lasts until the next one is asked for, and their buffer no longer than the loop that asks.
    """

    group: ProjectionGroup
    dtype: torch.dtype
    b: torch.Tensor | None

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        group = self.group
        buffer = group.widest_buffer(self.dtype)
        for rows, projection in zip(group.row_slices, group.projections, strict=True):
            assert isinstance(projection.weight, Nf4Weight)
            matrix = buffer[: projection.out_features]
            dequantize_nf4(projection.weight, self.dtype, out=matrix[:, : group.in_features])
            if self.b is not None:
                copy_rows(matrix[:, group.in_features :], self.b[rows])
            yield rows, matrix


def spares_memory_in_turn(group: ProjectionGroup, rows: int) -> bool:
    """Whether inputs of so many rows leave most of what a group spares whose weights are there in turn: of each weight
    but the widest 2 bytes. The fp32 sum of the input's gradient and its rounded copy take 6 a value, and may take half.

    In deterministic mode none is: sums in another order would not be the bits of a plan with more memory.
    """
    if torch.are_deterministic_algorithms_enabled() or group.is_fp8 or not group.is_packed:
        return False
    return 6 * rows < group.out_features - group.widest

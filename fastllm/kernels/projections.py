"""Linear projections of one input, with LoRA, as plain tensors: what the ops of lora.py work on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .fp8 import MULTIPLE, row_bytes
from .nf4 import Nf4Weight

# Columns of the extension are padded to this multiple: narrower ones fall off cuBLAS's fast kernels on wide outputs.
EXTENSION_MULTIPLE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """One linear layer as plain tensors. `weight` is [N, K], dense or 4-bit; `lora_a` [r, K] and `lora_b` [N, r]."""

    weight: torch.Tensor | Nf4Weight
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def is_packed(self) -> bool:
        return isinstance(self.weight, Nf4Weight)

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    def parameters(self) -> tuple[torch.Tensor | None, ...]:
        """(weight, bias, A, B) with None for what is absent or can't take a gradient."""
        weight = self.weight if isinstance(self.weight, torch.Tensor) else None
        return weight, self.bias, self.lora_a, self.lora_b


PARAMETERS_PER_PROJECTION = 4


class ProjectionGroup:
    """Projections that read the same input, in the order of their columns in the joined output.

    With `is_fp8` their frozen weights are multiplied in FP8; `fp8_obstacle` has to be None.
    """

    __slots__ = (
        "extension", "has_dropout", "in_features", "is_fp8", "out_features", "projections", "rank", "rank_slices",
        "row_slices",
    )  # fmt: skip

    def __init__(self, projections: Sequence[Projection], *, is_fp8: bool = False) -> None:
        self.projections = tuple(projections)
        self.is_fp8 = is_fp8
        self.in_features = self.projections[0].weight.shape[1]
        self.row_slices, self.rank_slices = [], []
        rows = ranks = 0
        for projection in self.projections:
            if projection.weight.shape[1] != self.in_features:
                raise ValueError(f"projections of a group read one input: {[p.weight.shape for p in projections]}")
            self.row_slices.append(slice(rows, rows + projection.out_features))
            self.rank_slices.append(slice(ranks, ranks + projection.rank))
            rows, ranks = rows + projection.out_features, ranks + projection.rank
        self.out_features, self.rank = rows, ranks
        self.extension = -(-ranks // EXTENSION_MULTIPLE) * EXTENSION_MULTIPLE
        self.has_dropout = any(p.dropout > 0 and p.rank for p in self.projections)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the weights ask to be multiplied in, outside autocast; None leaves it to the input."""
        weight = self.projections[0].weight
        return weight.compute_dtype if isinstance(weight, Nf4Weight) else weight.dtype

    @property
    def is_packed(self) -> bool:
        """Whether all weights are 4-bit."""
        return all(projection.is_packed for projection in self.projections)

    def parameters(self) -> list[torch.Tensor | None]:
        """`PARAMETERS_PER_PROJECTION` entries a projection; the order of the gradients of `project_backward`."""
        return [parameter for projection in self.projections for parameter in projection.parameters()]

    def kept_bytes(self, dtype: torch.dtype) -> int:
        """What `prepare` holds from call to call where it is given something to keep it in."""
        if not any(projection.is_packed for projection in self.projections):
            return 0
        if self.is_fp8:  # values and scales; unless a dense part changes them, both again as the backward reads them
            held = self.out_features * (row_bytes(self.in_features, self.rank) + 4)
            transposed = self.in_features * (row_bytes(self.out_features, self.rank) + 4) + 2 * self.out_features
            return held + self.is_packed * transposed
        return (self.out_features + self.extension) * (self.in_features + self.extension) * dtype.itemsize

    def input_buffer(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A `[T, K + E]` whose left part takes the input, for the extended product; its contents are undefined."""
        return _finite_buffer(like.shape[0], self.in_features + self._spare_columns, dtype, like.device)

    def weight_buffer(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """A `[rows, K + E]` that takes rows of a weight, with those of B beside them; its contents are undefined."""
        device = self.projections[0].weight.device
        return _finite_buffer(rows, self.in_features + self.extension, dtype, device)

    def output_buffer(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A `[T, N + E]` whose left part takes the output, or its gradient; its contents are undefined."""
        return _finite_buffer(like.shape[0], self.output_buffer_width, dtype, like.device)

    @property
    def output_buffer_width(self) -> int:
        return self.out_features + self._spare_columns

    @property
    def _spare_columns(self) -> int:
        return 0 if self.is_fp8 else self.extension  # FP8 products are extended in FP8, and want contiguous results


def fp8_obstacle(projections: Sequence[Projection]) -> str | None:
    """Why the weights can't be multiplied in FP8, or None."""
    if any(isinstance(p.weight, torch.Tensor) and p.weight.requires_grad for p in projections):
        return "a weight is trained"
    sizes = {size for projection in projections for size in projection.weight.shape}
    if any(size % MULTIPLE for size in sizes):
        return f"a weight has a size that is no multiple of {MULTIPLE}"
    return None


def _finite_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer that holds no NaN before it is written.

    On CPUs with AMX the bf16 product of a narrower view reads on to the end of a tile, and multiplies what is there
    by zero (oneDNN of torch 2.13).
    """
    make = torch.zeros if device.type == "cpu" else torch.empty
    return make(rows, columns, dtype=dtype, device=device)

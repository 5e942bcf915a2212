"""The forms in which the weights of a group enter its products: one buffer in the compute dtype, or FP8.

What is made of 4-bit weights may be kept from call to call (kept_weights.py); the adapters' part of a form is written
anew each time.

Shapes: W [N, K], with room for A and B beside it.  Dtypes: the compute dtype, or those of fp8.py.
Source: `lora.py`.
"""

from collections.abc import Callable
from typing import Any

import torch

from .fp8 import Fp8Matrix, Fp8Weight, quantize_weight
from .kept_weights import KeptForm
from .nf4 import Nf4Weight, dequantize_nf4
from .projections import ProjectionGroup
from .row_copy import copy_rows


def joined_weights(
    group: ProjectionGroup, dtype: torch.dtype, device: torch.device, kept: KeptForm | None
) -> torch.Tensor:
    """The buffer [N + E, K + E] with W in place; B and A are still to be written."""
    known, remember = _kept_form(group, dtype, kept)
    shape = (group.out_features + group.extension, group.in_features + group.extension)
    joined = torch.empty(shape, dtype=dtype, device=device) if known is None else known
    for rows, projection in zip(group.row_slices, group.projections, strict=True):
        target = joined[rows, : group.in_features]
        if not isinstance(projection.weight, Nf4Weight):
            copy_rows(target, projection.weight)
        elif known is None:
            dequantize_nf4(projection.weight, dtype, out=target)
    remember(joined)
    return joined


def fp8_weights(group: ProjectionGroup, dtype: torch.dtype, device: torch.device, kept: KeptForm | None) -> Fp8Weight:
    """W [N, K] in FP8, with room for B; with its transpose, and room for A, where both stay."""
    known, remember = _kept_form(group, dtype, kept)
    n, k, rank = group.out_features, group.in_features, group.rank
    fp8 = Fp8Weight(Fp8Matrix.empty(n, k, device, rank=rank)) if known is None else known
    for rows, projection in zip(group.row_slices, group.projections, strict=True):
        if not isinstance(projection.weight, Nf4Weight):
            quantize_weight(projection.weight.detach(), out=fp8.by_output.rows(rows))
        elif known is None:
            quantize_weight(dequantize_nf4(projection.weight, dtype), out=fp8.by_output.rows(rows))
    if known is None and kept is not None and group.is_packed:
        fp8 = Fp8Weight(fp8.by_output, fp8.transposed(rank), fp8.folded_scales())
    remember(fp8)
    return fp8


def _kept_form(group: ProjectionGroup, dtype: torch.dtype, kept: KeptForm | None) -> tuple[Any, Callable[[Any], None]]:
    """What is kept of a group's 4-bit weights, or None, and a function that takes what shall be kept of them."""
    packed = [p.weight for p in group.projections if isinstance(p.weight, Nf4Weight)]
    if kept is None or not packed:
        return None, lambda form: None
    is_packed = tuple(p.is_packed for p in group.projections)
    layout = (group.out_features, group.in_features, group.extension, group.rank, is_packed, group.is_fp8, dtype)
    known = kept.find(packed, layout)
    return known, lambda form: None if known is not None else kept.store(packed, layout, form)

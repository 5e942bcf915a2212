"""Gradients of projections whose input is the output of an RMSNorm, without that output where LoRA alone is trained.

The norm scales rows by rstd and columns by its weight, so both factors can leave the product that makes LoRA's dA:

    dA = (dY B)^T norm(x) = (rstd dY B)^T x * (w + offset)

Scaling [T, E] and [E, D] spares a pass that reads and one that writes [T, D], and its memory. What is rounded to 16
bits is rstd dY B in the place of norm(x).

Shapes: x [T, D], rstd [T], dY B [T, E].  Dtypes: x in the compute dtype, which needs the range of fp32.
Source: associativity; RMSNorm as in rms_norm.py.
"""

from collections.abc import Sequence

import torch

from .layer_definition import Norm
from .lora import PARAMETERS_PER_PROJECTION, PreparedGroup, parameter_grads, stacked_a_grad
from .projections import ProjectionGroup
from .rms_norm import rms_norm_forward


def normed_parameter_grads(
    prepared: PreparedGroup,
    norm: Norm,
    x: torch.Tensor,
    rstd: torch.Tensor,
    dy: torch.Tensor,
    dy_low_rank: torch.Tensor | None,
    low_rank: torch.Tensor | None,
    masks: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    *,
    known_db: Sequence[torch.Tensor | None] = (),
) -> list[torch.Tensor | None]:
    """`parameter_grads` of a group that read the norm of `x [T, D]`, whose `rstd [T]` is that of the forward."""
    needs_weight, needs_a = any(needs[0::PARAMETERS_PER_PROJECTION]), any(needs[2::PARAMETERS_PER_PROJECTION])
    has_range = x.dtype == dy.dtype and x.dtype != torch.float16
    is_read = needs_weight or (needs_a and (prepared.group.has_dropout or not has_range))
    hidden, stacked_da = x, None
    if is_read:
        hidden = torch.empty(x.shape, dtype=dy.dtype, device=x.device)
        rms_norm_forward(x, norm.weight, norm.eps, offset=norm.offset, out=hidden)
    elif needs_a:
        assert dy_low_rank is not None
        stacked_da = _stacked_da(prepared.group, norm, x, rstd, dy_low_rank)
    return parameter_grads(
        prepared, dy, dy_low_rank, hidden, low_rank, masks, needs, stacked_da=stacked_da, known_db=known_db
    )


def _stacked_da(
    group: ProjectionGroup, norm: Norm, x: torch.Tensor, rstd: torch.Tensor, dy_low_rank: torch.Tensor
) -> torch.Tensor:
    """`stacked_a_grad` of norm(x) [ranks, D]."""
    scaled = torch.empty(dy_low_rank.shape, dtype=dy_low_rank.dtype, device=dy_low_rank.device)
    torch.mul(dy_low_rank, rstd[:, None], out=scaled)
    product = stacked_a_grad(group, scaled, x)
    weight = norm.weight.detach()
    return product.mul_(weight.to(product.dtype) + norm.offset if norm.offset else weight)

"""The adapters of a group, scaled and laid out as its products read them.

Shapes: A [E, K], B [N, E] with E the sum of ranks, padded.  Dtypes: any float dtype each; values are rounded once.
"""

import torch

from .dispatch import jit, launch_on, next_power_of_2, tl, triton, use_triton
from .projections import ProjectionGroup

_MAX_FILLED = 3


def fill_low_rank(group: ProjectionGroup, a: torch.Tensor, b: torch.Tensor) -> None:
    """Write stack(s_i A_i) into `a [E, K]` and blockdiag(B_i) into `b [N, E]`, zeros elsewhere."""
    if not (use_triton(a) and len(group.projections) <= _MAX_FILLED):
        a.zero_()
        b.zero_()
        for projection, rows, ranks in zip(group.projections, group.row_slices, group.rank_slices, strict=True):
            if projection.lora_a is not None and projection.lora_b is not None:
                a[ranks].copy_(projection.lora_a.detach() * projection.scaling)
                b[rows, ranks].copy_(projection.lora_b.detach())
        return
    e, k = a.shape
    n = b.shape[0]
    pointers, numbers = [], []
    for index in range(_MAX_FILLED):
        present = index < len(group.projections)
        projection = group.projections[index] if present else None
        numbers += [group.row_slices[index].start, group.rank_slices[index].start] if present else [n, e]
        if projection is not None and projection.lora_a is not None and projection.lora_b is not None:
            pointers += [projection.lora_a.detach().contiguous(), projection.lora_b.detach().contiguous()]
            numbers += [projection.rank, float(projection.scaling)]
        else:
            pointers += [a, b]
            numbers += [0, 0.0]
    block_k, block_n, block_e = 1024, 64, next_power_of_2(e)
    a_programs_per_row = triton.cdiv(k, block_k)
    with launch_on(a):
        _fill_low_rank_kernel[(e * a_programs_per_row + triton.cdiv(n, block_n),)](
            a, b, *pointers, *numbers, e, k, n, a.stride(0), b.stride(0), a_programs_per_row,
            BLOCK_K=block_k, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=4,
        )  # fmt: skip


@jit
def _fill_low_rank_kernel(
    a_ptr, b_ptr, a0, b0, a1, b1, a2, b2,
    row0, rank0, r0, s0, row1, rank1, r1, s1, row2, rank2, r2, s2,
    e, k, n, a_stride, b_stride, a_programs_per_row,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < e * a_programs_per_row:
        row = program // a_programs_per_row
        cols = (program % a_programs_per_row) * BLOCK_K + tl.arange(0, BLOCK_K)
        live = cols < k
        in0, in1, in2 = row < rank0 + r0, (row >= rank1) & (row < rank1 + r1), (row >= rank2) & (row < rank2 + r2)
        value = tl.load(a0 + (row - rank0) * k + cols, mask=live & in0, other=0.0).to(tl.float32) * s0
        value += tl.load(a1 + (row - rank1) * k + cols, mask=live & in1, other=0.0).to(tl.float32) * s1
        value += tl.load(a2 + (row - rank2) * k + cols, mask=live & in2, other=0.0).to(tl.float32) * s2
        tl.store(a_ptr + row.to(tl.int64) * a_stride + cols, value.to(a_ptr.dtype.element_ty), mask=live)
    else:
        rows = (program - e * a_programs_per_row) * BLOCK_N + tl.arange(0, BLOCK_N)
        i = rows[:, None]
        j = tl.arange(0, BLOCK_E)[None, :]
        inside = (i < n) & (j < e)
        own0 = inside & (i < row1) & (j < r0)
        own1 = inside & (i >= row1) & (i < row2) & (j >= rank1) & (j < rank1 + r1)
        own2 = inside & (i >= row2) & (j >= rank2) & (j < rank2 + r2)
        entry = tl.load(b0 + (i - row0) * r0 + (j - rank0), mask=own0, other=0.0).to(tl.float32)
        entry += tl.load(b1 + (i - row1) * r1 + (j - rank1), mask=own1, other=0.0).to(tl.float32)
        entry += tl.load(b2 + (i - row2) * r2 + (j - rank2), mask=own2, other=0.0).to(tl.float32)
        tl.store(b_ptr + i.to(tl.int64) * b_stride + j, entry.to(b_ptr.dtype.element_ty), mask=inside)

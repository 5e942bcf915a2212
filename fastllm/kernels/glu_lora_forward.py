"""A gated linear unit and the narrow product that LoRA makes of it, in one pass:

    h = act(gate) * up        h A^T

h is written for the large product that comes next, and multiplied by A of that one while it is in registers: by itself
the narrow product would take as long as reading h does. A program owns its rows, so every sum has one order.

Shapes: gate, up, h [T, F]; A [E, F] of which `rank` rows count, h A^T [T, E].
Dtypes: one of fp16, bf16, fp32, to which h is rounded before it is multiplied; sums are fp32, rounded once.
Source: the GLU's is `glu.py`, that of the product `lora.py`.
"""

import torch

from .activation import activate, require_known
from .copy_lora import Tiling, multiply_reference, padded
from .dispatch import (
    compiles_to_ptx,
    dot_precision,
    has_tensor_cores,
    jit,
    launch_on,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)
from .glu import glu_forward

_MAX_RANK = 32  # more take the registers that the tile is in


# By bytes of an element. Few rows, so that every multiprocessor has some; the widest tile that fits every GPU. It takes
# twice as many warps for twice the rank.
_TILINGS = {2: Tiling(16, 256, 4, 3), 4: Tiling(16, 64, 4, 2)}


def serves_rank(rank: int, x: torch.Tensor) -> bool:
    """Whether the kernel can run for matrices like `x`: Triton has to know tensor cores there."""
    return use_triton(x) and 0 < rank <= _MAX_RANK and has_tensor_cores(x)


def glu_lora_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    a: torch.Tensor,
    rank: int,
    *,
    out: torch.Tensor,
    low_rank: torch.Tensor,
) -> None:
    """Write h to `out` and h A^T to `low_rank [T, E]`, zeros past the first `rank` of `a [E, F]`.

    All are rows with unit stride along their columns. Other activations raise a ValueError.
    """
    require_known(activation)
    if not use_triton(gate):
        glu_forward(gate, up, activation, out=out)
        multiply_reference(out, a, rank, low_rank)
        return
    rows, width = gate.shape
    padded_rank = padded(rank)
    tiling = _TILINGS[gate.dtype.itemsize]
    if rows:
        with launch_on(gate):
            _glu_lora_fwd_kernel[(triton.cdiv(rows, tiling.rows),)](
                gate, up, out, a, low_rank, rows, width, rank, low_rank.shape[1],
                *(t.stride(0) for t in (gate, up, out, a, low_rank)), ACTIVATION=activation,
                PTX=compiles_to_ptx(gate), PRECISION=dot_precision(gate.dtype), ROWS=tiling.rows,
                COLUMNS=tiling.columns, RANK=padded_rank, EXTENSION=next_power_of_2(low_rank.shape[1]),
                num_warps=tiling.num_warps * padded_rank // 16, num_stages=tiling.num_stages,
            )  # fmt: skip


@jit
def _glu_lora_fwd_kernel(
    gate_ptr, up_ptr, h_ptr, a_ptr, low_rank_ptr, num_rows, width, rank, extension,
    gate_stride, up_stride, h_stride, a_stride, low_rank_stride,
    ACTIVATION: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, EXTENSION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = (rows < num_rows)[:, None]
    rows = rows.to(tl.int64)[:, None]
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        live = row_live & (cols < width)[None, :]
        gate = tl.load(gate_ptr + rows * gate_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + rows * up_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + ranks[:, None] * a_stride + cols[None, :],
                    mask=(ranks < rank)[:, None] & (cols < width)[None, :], other=0.0)  # fmt: skip
        acted, _ = activate(gate, ACTIVATION, PTX)
        h = tl.where(live, acted * up, 0.0).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * h_stride + cols[None, :], h, mask=live)
        total = tl.dot(h, tl.trans(a), total, input_precision=PRECISION)
    # As `store_product` of copy_lora.py does: called from here, it makes Triton spill registers for sm_90.
    beyond = tl.arange(0, EXTENSION)[None, :]
    zeros = tl.zeros((ROWS, EXTENSION), dtype=low_rank_ptr.dtype.element_ty)
    at = low_rank_ptr + rows * low_rank_stride
    tl.store(at + beyond, zeros, mask=row_live & (beyond >= rank) & (beyond < extension))
    tl.store(at + ranks[None, :], total.to(low_rank_ptr.dtype.element_ty), mask=row_live & (ranks < rank)[None, :])

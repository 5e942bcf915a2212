"""Gated linear unit over products that lack LoRA's term, which is added where they are read:

    h = act(gate + L_g R_g) * (up + L_u R_u)        backward from dh + L_h R_h

An FP8 product is not extended by its low-rank term, and adding that to it afterwards reads and writes the widest
matrices of a layer once more. Here the term of each tile is made in registers: it costs hardly any memory traffic, and
the sum is not rounded before it is used.

Shapes: gate, up, h and their gradients [T, F]; each term L [T, r], R [r, F], its R scaled by a number.
Dtypes: products of the dtype of L (R is rounded to it) with fp32 sums; arithmetic in fp32, rounded once.
Source: the GLU's is `glu.py`, that of the terms `lora.py`.
"""

from typing import NamedTuple

import torch

from .activation import activate, require_known
from .dispatch import dot_precision, jit, launch_on, tl, triton, use_triton, vjp
from .glu import glu_reference
from .projections import ProjectionGroup

_ROWS, _COLUMNS = 64, 64


class LowRankTerm(NamedTuple):
    """`left [T, r] @ right [r, F] * scaling`; either may be a view of any strides."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float = 1.0

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        right = (self.right * self.scaling).to(self.left.dtype)
        return self.left.to(dtype) @ right.to(dtype)


def output_term(group: ProjectionGroup, low_rank: torch.Tensor, columns: slice) -> LowRankTerm | None:
    """What the columns, all of one projection, of a group's output get from its adapter; `low_rank` is x A^T."""
    for projection, rows, ranks in zip(group.projections, group.row_slices, group.rank_slices, strict=True):
        if projection.lora_b is not None and rows.start <= columns.start and columns.stop <= rows.stop:
            right = projection.lora_b.detach()[columns.start - rows.start : columns.stop - rows.start]
            return LowRankTerm(low_rank[:, ranks], right.t())
    return None


def input_term(group: ProjectionGroup, dy_low_rank: torch.Tensor) -> LowRankTerm | None:
    """What the gradient of the input of a group of one projection gets from its adapter; `dy_low_rank` is dY B."""
    (projection,), (ranks,) = group.projections, group.rank_slices
    if projection.lora_a is None:
        return None
    return LowRankTerm(dy_low_rank[:, ranks], projection.lora_a.detach(), float(projection.scaling))


def low_rank_glu_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    gate_term: LowRankTerm | None,
    up_term: LowRankTerm | None,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """Rows h `[T, F]` in `out`; gate, up and out may be column slices of wider buffers."""
    require_known(activation)
    if not use_triton(gate):
        return out.copy_(glu_reference(_summed(gate, gate_term), _summed(up, up_term), activation))
    rows, width = gate.shape
    terms, present = _arguments((gate_term, up_term), gate)
    if rows:
        with launch_on(gate):
            _low_rank_glu_fwd_kernel[(triton.cdiv(width, _COLUMNS), triton.cdiv(rows, _ROWS))](
                gate, up, out, *terms, rows, width, gate.stride(0), up.stride(0), out.stride(0),
                ACTIVATION=activation, **present, PRECISION=dot_precision(gate.dtype), ROWS=_ROWS, COLUMNS=_COLUMNS,
                num_warps=8, num_stages=1,
            )  # fmt: skip
    return out


def low_rank_glu_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dh_term: LowRankTerm | None,
    gate_term: LowRankTerm | None,
    up_term: LowRankTerm | None,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    *,
    h_out: torch.Tensor,
) -> None:
    """Write the gradients of the complete gate and up into `dgate` and `dup`, and h into `h_out`.

    Outputs may overlay the inputs of the same shape (dgate on gate, dup on up, h_out on dh).
    """
    if not use_triton(gate):
        wide = _summed(gate, gate_term), _summed(up, up_term)
        h = glu_reference(*wide, activation)
        grads = vjp(lambda a, b: glu_reference(a, b, activation), wide, _summed(dh, dh_term))
        for target, value in zip((dgate, dup, h_out), (*grads, h), strict=True):
            assert value is not None
            target.copy_(value)
        return
    rows, width = gate.shape
    terms, present = _arguments((gate_term, up_term, dh_term), gate)
    if rows:
        with launch_on(gate):
            _low_rank_glu_bwd_kernel[(triton.cdiv(width, _COLUMNS), triton.cdiv(rows, _ROWS))](
                dh, gate, up, dgate, dup, h_out, *terms, rows, width,
                dh.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0), h_out.stride(0),
                ACTIVATION=activation, **present, PRECISION=dot_precision(gate.dtype), ROWS=_ROWS, COLUMNS=_COLUMNS,
                num_warps=8, num_stages=1,
            )  # fmt: skip


def _summed(value: torch.Tensor, term: LowRankTerm | None) -> torch.Tensor:
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    return wide if term is None else wide + term.value(wide.dtype)


def _arguments(terms: tuple[LowRankTerm | None, ...], like: torch.Tensor) -> tuple[list, dict[str, bool]]:
    """Of each term: pointers, rank, strides and scaling; and whether it is there."""
    arguments, present = [], {}
    for name, term in zip(("HAS_GATE", "HAS_UP", "HAS_DH"), terms, strict=False):
        present[name] = term is not None
        if term is None:
            arguments += [like, like, 0, 0, 0, 0, 0, 0.0]
        else:
            left, right, scaling = term
            arguments += [left, right, right.shape[0], *left.stride(), *right.stride(), scaling]
    return arguments, present


@jit
def _complete(
    product_ptr, stride, left_ptr, right_ptr, rank, left_row, left_rank, right_rank, right_column, scaling,
    rows, cols, num_rows, width, HAS_TERM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a product in fp32, with that of its term where there is one."""
    live = (rows < num_rows)[:, None] & (cols < width)[None, :]
    value = tl.load(product_ptr + rows[:, None] * stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
    if HAS_TERM:
        for start in range(0, rank, 16):  # the fewest that tensor cores take
            ranks = start + tl.arange(0, 16)
            left = tl.load(
                left_ptr + rows[:, None] * left_row + ranks[None, :] * left_rank,
                mask=(rows < num_rows)[:, None] & (ranks < rank)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                right_ptr + ranks[:, None] * right_rank + cols[None, :] * right_column,
                mask=(ranks < rank)[:, None] & (cols < width)[None, :], other=0.0,
            )  # fmt: skip
            right = (right.to(tl.float32) * scaling).to(left.dtype)
            value += tl.dot(left, right, input_precision=PRECISION)
    return value


@jit
def _low_rank_glu_fwd_kernel(
    gate_ptr, up_ptr, h_ptr,
    gate_left, gate_right, gate_rank, gl_row, gl_rank, gr_rank, gr_column, gate_scaling,
    up_left, up_right, up_rank, ul_row, ul_rank, ur_rank, ur_column, up_scaling,
    num_rows, width, gate_stride, up_stride, h_stride,
    ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, HAS_UP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = (rows < num_rows)[:, None] & (cols < width)[None, :]
    gate = _complete(
        gate_ptr, gate_stride, gate_left, gate_right, gate_rank, gl_row, gl_rank, gr_rank, gr_column, gate_scaling,
        rows, cols, num_rows, width, HAS_GATE, PRECISION,
    )  # fmt: skip
    up = _complete(
        up_ptr, up_stride, up_left, up_right, up_rank, ul_row, ul_rank, ur_rank, ur_column, up_scaling,
        rows, cols, num_rows, width, HAS_UP, PRECISION,
    )  # fmt: skip
    acted, _ = activate(gate, ACTIVATION)
    tl.store(h_ptr + rows[:, None] * h_stride + cols[None, :], (acted * up).to(h_ptr.dtype.element_ty), mask=live)


@jit
def _low_rank_glu_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr,
    gate_left, gate_right, gate_rank, gl_row, gl_rank, gr_rank, gr_column, gate_scaling,
    up_left, up_right, up_rank, ul_row, ul_rank, ur_rank, ur_column, up_scaling,
    dh_left, dh_right, dh_rank, hl_row, hl_rank, hr_rank, hr_column, dh_scaling,
    num_rows, width, dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, h_stride,
    ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, HAS_UP: tl.constexpr, HAS_DH: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = (rows < num_rows)[:, None] & (cols < width)[None, :]
    gate = _complete(
        gate_ptr, gate_stride, gate_left, gate_right, gate_rank, gl_row, gl_rank, gr_rank, gr_column, gate_scaling,
        rows, cols, num_rows, width, HAS_GATE, PRECISION,
    )  # fmt: skip
    up = _complete(
        up_ptr, up_stride, up_left, up_right, up_rank, ul_row, ul_rank, ur_rank, ur_column, up_scaling,
        rows, cols, num_rows, width, HAS_UP, PRECISION,
    )  # fmt: skip
    dh = _complete(
        dh_ptr, dh_stride, dh_left, dh_right, dh_rank, hl_row, hl_rank, hr_rank, hr_column, dh_scaling,
        rows, cols, num_rows, width, HAS_DH, PRECISION,
    )  # fmt: skip
    acted, slope = activate(gate, ACTIVATION)
    # Outputs may lie where other threads read: all have read by here.
    tl.debug_barrier()
    dgate, dup, h = dh * up * slope, dh * acted, acted * up
    tl.store(dgate_ptr + rows[:, None] * dgate_stride + cols[None, :], dgate.to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(dup_ptr + rows[:, None] * dup_stride + cols[None, :], dup.to(dup_ptr.dtype.element_ty), mask=live)
    tl.store(h_ptr + rows[:, None] * h_stride + cols[None, :], h.to(h_ptr.dtype.element_ty), mask=live)

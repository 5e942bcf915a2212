"""Backward of a gated linear unit between LoRA projections, with the narrow products of the wide matrices it makes:

    dgate = dh * up * act'(gate)        dup = dh * act(gate)        h = act(gate) * up
    of each X of dgate, dup and h:      X R  and  X^T L

With R = B and L = x A^T of gate and up these are dY B and dB, with R = A^T and L = dY B of down h A^T and dA^T. Such a
product takes as long as reading X does. Here each tile of X is multiplied while it is in registers: dgate and dup are
written and not read again, and h, which nothing else wants, is not even written.

Strips of columns are cut into tiles, of which each program takes as many: it walks down a strip, or out of one into the
next. It holds its part of each X^T L of a strip; its part of X R is one of as many as there are strips. Such parts are
added up afterwards, in a fixed order: the same bits on every run.

Shapes: dh, gate, up, dgate, dup [T, F]; R [F, r], L [T, r] with r at most `MAX_RANK`.
Dtypes: dh, gate, up and L in one of fp16, bf16, fp32, to which X and R are rounded before they are multiplied; sums are
fp32.
Source: the GLU's is `glu.py`, that of the products `lora.py`.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from .activation import activate, require_known
from .dispatch import (
    compiles_to_ptx,
    dot_precision,
    has_tensor_cores,
    is_hopper,
    jit,
    launch_on,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)
from .glu import glu_backward
from .part_sums import PartSum, add_up
from .products import matmul_fp32
from .projections import ProjectionGroup

MAX_RANK = 16  # with 32, the products by themselves are faster
# Bytes that the parts of X R may take: more rows than fit, 9,000 of a model of 8B parameters, take several launches.
_SCRATCH_BYTES = 2**27


class Narrow(NamedTuple):
    """What X is multiplied with: `left [T, r]` and, where X R is wanted, `right [F, r]`; `out [T, r]` takes X R, the
    last two in any dtype. All may be views of any strides. X^T L is wanted `factor` times."""

    left: torch.Tensor
    right: torch.Tensor | None = None
    out: torch.Tensor | None = None
    factor: float = 1.0


class Tiling(NamedTuple):
    """The tile that a program computes at a time, how it is compiled, and how many `programs` there are for each
    multiprocessor of the GPU: as many as run at once, or fewer where the memory does not keep up with those."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    programs: float
    max_registers: int | None = None  # of a thread: fewer let more programs run at a time


# By bytes of an element. They fit the shared memory of every GPU that the README names, and spill no register with SiLU
# and GELU.
_TILINGS = {2: Tiling(32, 128, 8, 2, 1.0, 255), 4: Tiling(16, 32, 8, 1, 4.0, 255)}
_TILINGS_AMD = {2: Tiling(16, 64, 4, 1, 2.0), 4: Tiling(16, 32, 4, 1, 2.0)}
# Takes up to 190 of the 227 KiB of shared memory that Hopper has, and nearly all registers.
_TILING_HOPPER = Tiling(64, 128, 8, 3, 1.0, 248)
# Few, so that a program of the interpreter passes from strip to strip.
_INTERPRETED_PROGRAMS = 7
# Of GPUs that torch does not ask for it: about that of the largest.
_MULTIPROCESSORS = 128


class LoraProducts(NamedTuple):
    """What the groups before and after a gated linear unit need not compute any more: of the first dY B [T, E] and each
    dB, of the second, whose one projection is down, h A^T [T, r], where it was asked for, and dA [r, F], scaled."""

    dy_low_rank: torch.Tensor | None = None
    db: Sequence[torch.Tensor | None] = ()
    low_rank: torch.Tensor | None = None
    da: torch.Tensor | None = None


def serves_groups(gate_up: ProjectionGroup, down: ProjectionGroup, x: torch.Tensor) -> bool:
    """Whether `glu_backward_between` can run for the groups around a gated linear unit, with matrices like `x`.

    It needs an adapter of theirs, tensor cores that Triton knows, and gate and up to be projections of their own.
    """
    ranks = [projection.rank for group in (gate_up, down) for projection in group.projections]
    if not (use_triton(x) and 0 < max(ranks) <= MAX_RANK and len(gate_up.projections) == 2):
        return False
    return not down.has_dropout and has_tensor_cores(x)


def glu_backward_between(
    gate_up: ProjectionGroup,
    down: ProjectionGroup,
    dh: torch.Tensor,
    values: torch.Tensor,
    extended: torch.Tensor,
    activation: str,
    *,
    low_rank: torch.Tensor | None,
    down_dy_low_rank: torch.Tensor | None,
    down_a: torch.Tensor | None,
    needs_down_low_rank: bool,
) -> LoraProducts:
    """Write the gradient of gate and up into the left part of `extended`, the buffer of `gate_up.output_buffer`, and
    their dY B into its right part, where it has one. `values`, whose first columns are gate and up `[T, 2F]`, may be
    the same buffer.

    `low_rank [T, E]` is x A^T of the first group, `down_dy_low_rank [T, E]` and `down_a [E, F]` dY B of the second and
    its A of `prepare`, None where a group has no adapter; h A^T is computed where `needs_down_low_rank`.
    """
    width = dh.shape[1]
    beside = dh.new_empty(dh.shape[0], gate_up.extension) if gate_up.is_fp8 else extended[:, gate_up.out_features :]
    narrow: list[Narrow | None] = []
    for projection, ranks in zip(gate_up.projections, gate_up.rank_slices, strict=True):
        if projection.lora_b is None or low_rank is None:
            narrow.append(None)
        else:
            b = projection.lora_b.detach()
            narrow.append(Narrow(low_rank[:, ranks], b, beside[:, ranks]))
    down_low_rank = None
    if down_dy_low_rank is None or down_a is None:
        narrow.append(None)
    else:
        (ranks,) = down.rank_slices
        left, right = down_dy_low_rank[:, ranks], down_a[ranks].t()
        down_low_rank = torch.empty_like(left) if needs_down_low_rank else None
        narrow.append(Narrow(left, right, down_low_rank, down.projections[0].scaling))
    beside.zero_()
    (gate, up), (dgate, dup) = ((t[:, :width], t[:, width : 2 * width]) for t in (values, extended))
    *db, da = glu_lora_backward(dh, gate, up, activation, dgate, dup, narrow=narrow)
    return LoraProducts(beside if low_rank is not None else None, db, down_low_rank, None if da is None else da.t())


def glu_lora_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    *,
    narrow: Sequence[Narrow | None],
) -> list[torch.Tensor | None]:
    """Write the gradients of gate and up into `dgate` and `dup`, which may overlay them, and X R of each of `narrow`,
    that of dgate, dup and h, into its `out`.

    All are rows `[T, F]` with unit stride along F. Other activations raise a ValueError.
    Returns: X^T L `[F, r]` in fp32 (float64 for float64) for each of `narrow`, or None where that is None; that of h is
    stored by columns.
    """
    require_known(activation)
    if not use_triton(gate):
        return _reference(dh, gate, up, activation, dgate, dup, narrow)
    rows, width = gate.shape
    ranks = [0 if part is None else part.left.shape[1] for part in narrow]
    out_ranks = [0 if part is None or part.out is None else part.left.shape[1] for part in narrow]
    tiling = _tiling(gate)
    programs = _programs(tiling, gate.device)
    strips = -(-width // tiling.columns)
    chunk = max(_SCRATCH_BYTES // (4 * strips * max(sum(out_ranks), 1)) // tiling.rows, 1) * tiling.rows
    strip_sums = torch.empty(strips * min(chunk, rows) * sum(out_ranks), dtype=torch.float32, device=gate.device)
    splits = programs // strips + 2  # the most programs that have tiles of one strip
    split_sums = torch.zeros(splits, width, sum(ranks), dtype=torch.float32, device=gate.device)
    for start in range(0, rows, chunk):
        taken = slice(start, min(start + chunk, rows))
        parts = [None if part is None else _rows_of(part, taken) for part in narrow]
        sums = strip_sums[: strips * (taken.stop - start) * sum(out_ranks)].view(
            strips, taken.stop - start, sum(out_ranks)
        )
        wide = [t[taken] for t in (dh, gate, up, dgate, dup)]
        _launch(wide, activation, parts, sums, split_sums, tiling, programs)
        outs = [None if part is None else part.out for part in parts]
        wanted = [PartSum(out, at) for out, at in zip(outs, _firsts(out_ranks), strict=True) if out is not None]
        add_up(sums, wanted)
    found: list[torch.Tensor | None] = [
        None if part is None else split_sums.new_empty(width, rank) for part, rank in zip(narrow, ranks, strict=True)
    ]
    if found[2] is not None:
        found[2] = split_sums.new_empty(ranks[2], width).t()
    factors = [1.0 if part is None else part.factor for part in narrow]
    placed = zip(found, _firsts(ranks), factors, strict=True)
    add_up(split_sums, [PartSum(out, at, factor) for out, at, factor in placed if out is not None])
    return found


def _tiling(x: torch.Tensor) -> Tiling:
    if torch.version.hip is not None:
        return _TILINGS_AMD[x.dtype.itemsize]
    if is_hopper(x) and x.dtype.itemsize == 2:
        return _TILING_HOPPER
    return _TILINGS[x.dtype.itemsize]


def _programs(tiling: Tiling, device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETED_PROGRAMS
    is_cuda = device.type == "cuda"
    count = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else _MULTIPROCESSORS
    return max(int(tiling.programs * count), 1)


def _reference(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    narrow: Sequence[Narrow | None],
) -> list[torch.Tensor | None]:
    """The definition."""
    h = torch.empty_like(dh)
    glu_backward(dh, gate, up, activation, dgate, dup, h_out=h)
    found: list[torch.Tensor | None] = []
    for x, part in zip((dgate, dup, h), narrow, strict=True):
        if part is not None and part.right is not None and part.out is not None:
            part.out.copy_(matmul_fp32(x, part.right.to(x.dtype)))
        found.append(None if part is None else matmul_fp32(x.t(), part.left, factor=part.factor))
    return found


def _firsts(ranks: Sequence[int]) -> list[int]:
    """Where the columns of each begin, side by side."""
    return list(accumulate(ranks, initial=0))[:-1]


def _rows_of(part: Narrow, rows: slice) -> Narrow:
    return part._replace(left=part.left[rows], out=None if part.out is None else part.out[rows])


def _launch(
    wide: Sequence[torch.Tensor],
    activation: str,
    narrow: Sequence[Narrow | None],
    strip_sums: torch.Tensor,
    split_sums: torch.Tensor,
    tiling: Tiling,
    programs: int,
) -> None:
    """Writes dgate, dup and each strip's part of X R, and adds to each split's part of X^T L."""
    rows, width = wide[0].shape
    arguments, flags = [], {}
    first = out_first = widest = 0
    for name, part in zip(("GATE", "UP", "H"), narrow, strict=True):
        left, right, out, _ = Narrow(wide[0][:, :0]) if part is None else part
        rank = left.shape[1]
        right, strides = (left, (0, 0)) if right is None else (right, right.stride())
        arguments += [left, right, rank, first, out_first, *left.stride(), *strides]
        flags |= {f"HAS_{name}": part is not None, f"HAS_{name}_OUT": out is not None}
        first, widest = first + rank, max(rank, widest)
        out_first += rank * flags[f"HAS_{name}_OUT"]
    strips, tiles = strip_sums.shape[0], triton.cdiv(rows, tiling.rows)
    share = triton.cdiv(strips * tiles, programs)
    limit = {} if tiling.max_registers is None else {"maxnreg": tiling.max_registers}
    with launch_on(wide[0]):
        _glu_lora_bwd_kernel[(triton.cdiv(strips * tiles, share),)](
            *wide, *arguments, strip_sums, split_sums, rows, width, strips * tiles, tiles, share, first, out_first,
            *(t.stride(0) for t in wide), ACTIVATION=activation, PTX=compiles_to_ptx(wide[0]), **flags,
            PRECISION=dot_precision(wide[0].dtype), ROWS=tiling.rows, COLUMNS=tiling.columns,
            RANK=max(next_power_of_2(widest), 16),
            num_stages=tiling.num_stages, num_warps=tiling.num_warps, **limit,
        )  # fmt: skip


@jit
def _narrow_tile(base, indices, limit, ranks, rank, stride, rank_stride):
    """[indices, RANK] of a narrow matrix, zeros past its ends."""
    live = (indices < limit)[:, None] & (ranks < rank)[None, :]
    return tl.load(base + indices[:, None] * stride + ranks[None, :] * rank_stride, mask=live, other=0.0)


@jit
def _store_narrow(base, indices, limit, ranks, rank, stride, value):
    live = (indices < limit)[:, None] & (ranks < rank)[None, :]
    tl.store(base + indices[:, None] * stride + ranks[None, :], value, mask=live)


@jit
def _in_registers(x, live, dtype: tl.constexpr, PTX: tl.constexpr):
    """`x` in `dtype`, zeros where it is not `live`, made once: by itself Triton computes anew, in the layout of each
    product that reads it, what it takes for small."""
    held = x.to(dtype)
    if PTX and held.dtype.primitive_bitwidth == 16:  # the loads gave the zeros; the move is no instruction
        held = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [held], dtype=held.dtype, is_pure=False, pack=2)
    else:
        held = tl.where(live, held, 0.0).to(dtype)
    return held


@jit
def _glu_lora_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    gate_left, gate_right, gate_rank, gate_first, gate_out_first, gl_row, gl_rank, gr_row, gr_rank,
    up_left, up_right, up_rank, up_first, up_out_first, ul_row, ul_rank, ur_row, ur_rank,
    h_left, h_right, h_rank, h_first, h_out_first, hl_row, hl_rank, hr_row, hr_rank,
    strip_sums, split_sums, num_rows, width, all_tiles, tiles_of_strip, share, all_ranks, all_out_ranks,
    dh_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    ACTIVATION: tl.constexpr, PTX: tl.constexpr, HAS_GATE: tl.constexpr, HAS_GATE_OUT: tl.constexpr,
    HAS_UP: tl.constexpr, HAS_UP_OUT: tl.constexpr, HAS_H: tl.constexpr, HAS_H_OUT: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first_tile = program * share
    last_tile = min(first_tile + share, all_tiles)
    ranks = tl.arange(0, RANK)
    dtype = dgate_ptr.dtype.element_ty
    for strip in range(first_tile // tiles_of_strip, tl.cdiv(last_tile, tiles_of_strip)):
        above = strip * tiles_of_strip
        cols = strip * COLUMNS + tl.arange(0, COLUMNS)
        strip_part = strip_sums + strip * num_rows * all_out_ranks
        split_part = split_sums + (program - above // share) * width * all_ranks
        gate_sum = _narrow_tile(split_part + gate_first, cols, width, ranks, gate_rank, all_ranks, 1)
        up_sum = _narrow_tile(split_part + up_first, cols, width, ranks, up_rank, all_ranks, 1)
        h_sum = _narrow_tile(split_part + h_first, cols, width, ranks, h_rank, all_ranks, 1)
        gate_r = _narrow_tile(gate_right, cols, width, ranks, gate_rank, gr_row, gr_rank).to(dtype)
        up_r = _narrow_tile(up_right, cols, width, ranks, up_rank, ur_row, ur_rank).to(dtype)
        h_r = _narrow_tile(h_right, cols, width, ranks, h_rank, hr_row, hr_rank).to(dtype)
        for tile in range(max(first_tile - above, 0), min(last_tile - above, tiles_of_strip)):
            rows = tile * ROWS + tl.arange(0, ROWS)
            live = (rows < num_rows)[:, None] & (cols < width)[None, :]
            wide_rows = rows.to(tl.int64)[:, None]
            gate = tl.load(gate_ptr + wide_rows * gate_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + wide_rows * up_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
            dh = tl.load(dh_ptr + wide_rows * dh_stride + cols[None, :], mask=live, other=0.0).to(tl.float32)
            acted, slope = activate(gate, ACTIVATION, PTX)
            dgate = _in_registers(dh * up * slope, live, dtype, PTX)
            dup = _in_registers(dh * acted, live, dtype, PTX)
            h = _in_registers(acted * up, live, dtype, PTX)
            # An output that overlays an input has its layout among threads, so each has read what it writes here.
            tl.store(dgate_ptr + wide_rows * dgate_stride + cols[None, :], dgate, mask=live)
            tl.store(dup_ptr + wide_rows * dup_stride + cols[None, :], dup, mask=live)
            if HAS_GATE:
                gate_l = _narrow_tile(gate_left, rows, num_rows, ranks, gate_rank, gl_row, gl_rank)
                gate_sum = tl.dot(tl.trans(dgate), gate_l, gate_sum, input_precision=PRECISION)
            if HAS_GATE_OUT:
                value = tl.dot(dgate, gate_r, input_precision=PRECISION)
                _store_narrow(strip_part + gate_out_first, rows, num_rows, ranks, gate_rank, all_out_ranks, value)
            if HAS_UP:
                up_l = _narrow_tile(up_left, rows, num_rows, ranks, up_rank, ul_row, ul_rank)
                up_sum = tl.dot(tl.trans(dup), up_l, up_sum, input_precision=PRECISION)
            if HAS_UP_OUT:
                value = tl.dot(dup, up_r, input_precision=PRECISION)
                _store_narrow(strip_part + up_out_first, rows, num_rows, ranks, up_rank, all_out_ranks, value)
            if HAS_H:
                h_l = _narrow_tile(h_left, rows, num_rows, ranks, h_rank, hl_row, hl_rank)
                h_sum = tl.dot(tl.trans(h), h_l, h_sum, input_precision=PRECISION)
            if HAS_H_OUT:
                value = tl.dot(h, h_r, input_precision=PRECISION)
                _store_narrow(strip_part + h_out_first, rows, num_rows, ranks, h_rank, all_out_ranks, value)
        if HAS_GATE:
            _store_narrow(split_part + gate_first, cols, width, ranks, gate_rank, all_ranks, gate_sum)
        if HAS_UP:
            _store_narrow(split_part + up_first, cols, width, ranks, up_rank, all_ranks, up_sum)
        if HAS_H:
            _store_narrow(split_part + h_first, cols, width, ranks, h_rank, all_ranks, h_sum)

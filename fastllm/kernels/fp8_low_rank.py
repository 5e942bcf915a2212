"""FP8 products with LoRA's low-rank term inside:  X W^T + L R^T  as one product of extended matrices.

    [L1 | L1 | L2 | Q_X] [R1 | R2 | R1 | Q_W]^T      L1 + L2 = L diag(b) / s_X      R1 + R2 = diag(1 / s_W) R / b

Each factor is the sum of two numbers of e4m3, so the term keeps 8 bits, as many as bf16 has, and only L2 R2^T is left
out. Added to a product that was rounded to bf16 before, a term of the first steps, a thousandth of it, would lose four
fifths of itself; and adding it would read and write the largest matrices of a layer once more. Its columns come first:
the sums of sm_90's tensor cores drop what is small beside a sum so far, and nothing is larger then.

The `balance` b, a power of two for each rank, lets the largest of R reach the upper part of e4m3's range. The scales of
X leave room for L, whatever its size, and those of W are never small enough to make R large (`quantize_weight`): the
term takes the range that it needs from X, of whose 15 powers of two few are used.

Shapes: X [T, K], W [N, K], L [T, r], R [N, r].
Dtypes: those of fp8.py; L and R in any float dtype.
Source: associativity; sums of two floats for one of more bits: Dekker, "A floating-point technique for extending the
available precision", Numer. Math. 18 (1971).
"""

from typing import NamedTuple

import torch

from .dispatch import jit, launch_on, next_power_of_2, tl, use_triton
from .fp8 import (
    Fp8Matrix,
    Fp8Weight,
    magnitude_bits,
    quantize_rows,
    scaled_matmul,
    split,
    split_reference,
)

# Programs that look for the largest values: whoever writes reads what each of them found.
_PARTS = 32
_TILE_VALUES = 1024
# The largest of each rank of R is scaled to less than this power of two, and at least half of it.
_TOP_EXPONENT = 7


class Term(NamedTuple):
    """The two factors of a low-rank term: `left [T, r]` and `right [N, r]`."""

    left: torch.Tensor
    right: torch.Tensor


def fp8_linear(
    x: torch.Tensor, weight: Fp8Weight, term: Term | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """X W^T [T, N] of `x [T, K]`, plus the term, in `out` where given (contiguous)."""
    return _product(x, weight.by_output, None, term, out)


def fp8_input_grad(dy: torch.Tensor, weight: Fp8Weight, term: Term | None = None) -> torch.Tensor:
    """dY W [T, K] of `dy [T, N]`, plus the term."""
    rank = 0 if term is None else term.right.shape[1]
    return _product(dy, weight.transposed(rank), weight.folded_scales(), term, None)


def _product(
    x: torch.Tensor, right: Fp8Matrix, factors: torch.Tensor | None, term: Term | None, out: torch.Tensor | None
) -> torch.Tensor:
    if term is None:
        return scaled_matmul(quantize_rows(x, factors=factors), right.plain, x.dtype, out=out)
    balance = write_right(right, term.right)
    quantized = quantize_rows(x, factors=factors, left=term.left, balance=balance)
    return scaled_matmul(quantized, right, x.dtype, out=out)


def write_right(matrix: Fp8Matrix, right: torch.Tensor) -> torch.Tensor:
    """Write `right [R, r]` to the extension of `matrix`, which has room for that rank. Returns: the balance [r]."""
    rows, rank = right.shape
    balance = torch.empty(rank, dtype=torch.float32, device=right.device)
    if not use_triton(right):
        return balance.copy_(_write_right_reference(matrix, right))
    ranks = next_power_of_2(rank)
    block = max(_TILE_VALUES // ranks, 16)
    share = -(-rows // (_PARTS * block)) * block
    parts = -(-rows // share)
    largest = torch.empty(parts, rank, dtype=torch.int32, device=right.device)
    with launch_on(right):
        _largest_kernel[(parts,)](
            right, matrix.scales, largest, rows, rank, share, *right.stride(), ROWS=block, RANKS=ranks, num_warps=4
        )
        _write_right_kernel[(-(-rows // block),)](
            right, matrix.scales, largest, balance, matrix.values.view(torch.uint8), rows, rank, matrix.extension,
            parts, *right.stride(), matrix.values.stride(0), TOP=_TOP_EXPONENT, ROWS=block, RANKS=ranks,
            EXTENSION=next_power_of_2(matrix.extension), num_warps=4,
        )  # fmt: skip
    return balance


def _write_right_reference(matrix: Fp8Matrix, right: torch.Tensor) -> torch.Tensor:
    """The definition."""
    rank = right.shape[1]
    value = right.float() / matrix.scales[:, None]
    largest = value.abs().amax(0)
    exponent = (torch.frexp(largest)[1] - _TOP_EXPONENT + 127).clamp(1, 253)
    balance = (exponent << 23).view(torch.float32)
    balance = torch.where(largest == 0, torch.zeros_like(balance), balance)
    balance = torch.where(largest.isfinite(), balance, torch.nan)
    high, low = split_reference(torch.where(balance == 0, torch.zeros_like(value), value / balance))
    for first, part in enumerate((high, low, high)):
        matrix.values[:, first * rank : (first + 1) * rank].copy_(part)
    matrix.values[:, 3 * rank : matrix.extension].view(torch.uint8).zero_()
    return balance


@jit
def _scaled_tile(right_ptr, scales_ptr, rows, ranks, num_rows, rank, row_stride, rank_stride):
    """[ROWS, RANKS] of diag(1 / s) R in fp32, zeros past its ends."""
    row_live = rows < num_rows
    scales = tl.load(scales_ptr + rows, mask=row_live, other=1.0)
    at = right_ptr + rows.to(tl.int64)[:, None] * row_stride + ranks[None, :] * rank_stride
    value = tl.load(at, mask=row_live[:, None] & (ranks < rank)[None, :], other=0.0)
    return value.to(tl.float32) / scales[:, None]


@jit
def _largest_kernel(
    right_ptr, scales_ptr, largest_ptr, num_rows, rank, share, row_stride, rank_stride,
    ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    ranks = tl.arange(0, RANKS)
    largest = tl.zeros((ROWS, RANKS), dtype=tl.int32)
    for start in range(0, share, ROWS):
        rows = tl.program_id(0) * share + start + tl.arange(0, ROWS)
        value = _scaled_tile(right_ptr, scales_ptr, rows, ranks, num_rows, rank, row_stride, rank_stride)
        largest = tl.maximum(largest, magnitude_bits(value))
    tl.store(largest_ptr + tl.program_id(0) * rank + ranks, tl.max(largest, axis=0), mask=ranks < rank)


@jit
def _write_right_kernel(
    right_ptr, scales_ptr, largest_ptr, balance_ptr, values_ptr, num_rows, rank, extension, parts,
    row_stride, rank_stride, values_stride,
    TOP: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, EXTENSION: tl.constexpr,
):  # fmt: skip
    ranks = tl.arange(0, RANKS)
    largest = tl.zeros((16, RANKS), dtype=tl.int32)
    for start in range(0, parts, 16):
        part = start + tl.arange(0, 16)
        live = (part < parts)[:, None] & (ranks < rank)[None, :]
        largest = tl.maximum(largest, tl.load(largest_ptr + part[:, None] * rank + ranks[None, :], mask=live, other=0))
    largest = tl.max(largest, axis=0)
    # The exponent of fp32 is one less than that of a mantissa in [1/2, 1).
    exponent = tl.minimum(tl.maximum((largest >> 23) + 1 - TOP, 1), 253)
    balance = tl.where(largest < 0x7F800000, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    reciprocal = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    balance, reciprocal = tl.where(largest == 0, 0.0, balance), tl.where(largest == 0, 0.0, reciprocal)
    if tl.program_id(0) == 0:
        tl.store(balance_ptr + ranks, balance, mask=ranks < rank)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = _scaled_tile(right_ptr, scales_ptr, rows, ranks, num_rows, rank, row_stride, rank_stride)
    high, low = split(value * reciprocal[None, :])
    row_live = (rows < num_rows)[:, None]
    live = row_live & (ranks < rank)[None, :]
    target = values_ptr + rows.to(tl.int64)[:, None] * values_stride
    tl.store(target + ranks[None, :], high, mask=live)
    tl.store(target + (rank + ranks)[None, :], low, mask=live)
    tl.store(target + (2 * rank + ranks)[None, :], high, mask=live)
    rest = tl.arange(0, EXTENSION)[None, :]
    zeros = tl.zeros((ROWS, EXTENSION), tl.uint8)
    tl.store(target + rest, zeros, mask=row_live & (rest >= 3 * rank) & (rest < extension))

"""Matrix products with frozen weights in 8-bit floats, scaled by row: twice the rate of bf16 on GPUs that have them.

    quantisation   Q = round_e4m3(X / s),  s_i = the least power of two with max_j |X_ij| <= 448 s_i
    forward        Y = X W^T   as   diag(s_X) (Q_X Q_W^T) diag(s_W)
    backward       dX = dY W   as   diag(s_G) (Q_G Q_W),  G = dY diag(s_W)

A weight is scaled by output channel, which is dX's inner dimension: its scales are folded into dY, so one payload of a
byte a weight serves both products, and the gradient is that of the weights that the forward used. Scales are powers of
two, so scaling and folding are exact and only the rounding to e4m3 is an error: at most 2^-4 of a value that is larger
than 2^-15 of its row's largest, 2.5 % on average, 3.6 % of a product of two matrices (in the L2 norm). Gradients are
e4m3 as well: under a scale for each row they need e5m2's range less than the bit that it costs. Tensor cores read FP8
along the inner dimension only, so the payload of a weight is transposed for dX: each time, or once where it is kept.

Sums are those of sm_90's tensor cores at full speed, which keep fewer bits: 0.2 % of a product over 4,096 values, 0.5 %
over 28,672 (in the L2 norm, measured on an H100), where the roundings above make 3.8 % either way.

LoRA's term of a product, L R^T, is added up with it, in columns before those of X and W (fp8_low_rank.py).

Shapes: X [T, K], W [N, K], dY [T, N]; scales [rows]. K and N are multiples of 16.
Dtypes: payloads float8_e4m3fn, scales fp32, sums fp32; results in bf16 from a GPU, in any dtype from the reference.
Rows that hold a NaN or an infinity become NaN. Source: Micikevicius et al., "FP8 Formats for Deep Learning",
arXiv 2209.05433; row-wise scales: torchao's float8 recipes, which sum as fast.
"""

from dataclasses import dataclass

import torch

from .dispatch import (
    compiles_to_ptx,
    jit,
    launch_on,
    next_power_of_2,
    num_warps_for,
    tl,
    triton,
    use_triton,
)

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# What the GPUs' products ask of inner and output dimensions.
MULTIPLE = 16
# (major, minor) of the first NVIDIA GPUs with FP8 products.
CAPABILITY = (8, 9)
_TILE = 64
# Rows of more values are read twice, so many at a time, the second time from a cache: registers would not hold them.
_WIDEST_ROW, _PIECE, _PIECE_WARPS = 16384, 4096, 16
# Rows that begin elsewhere than at such a multiple of bytes make a product up to half slower on an H100.
_ALIGNMENT = 128
# The columns of a low-rank term are filled up with zeros to such a multiple.
_EXTENSION_MULTIPLE = 64
# Rows of a weight are scaled as if their largest value were at least this part of the matrix's: below it e4m3 has the
# range to spare, and what is added to a row need not be as large beside its values (fp8_low_rank.py).
_LEAST_PART = 2.0**-8


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Matrix:
    """`values` float8_e4m3fn [R, P + C] and `scales` fp32 [R], whose product, row by row, is the matrix. Its first P
    columns, the `extension`, are those of a low-rank term."""

    values: torch.Tensor
    scales: torch.Tensor
    extension: int = 0

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device, *, rank: int = 0) -> "Fp8Matrix":
        """A matrix of that shape with room for a term of that rank."""
        extension = extension_width(rank)
        buffer = torch.empty(rows, row_bytes(columns, rank), dtype=torch.uint8, device=device)
        scales = torch.empty(rows, dtype=torch.float32, device=device)
        return cls(buffer.view(DTYPE)[:, : extension + columns], scales, extension)

    def rows(self, rows: slice) -> "Fp8Matrix":
        return Fp8Matrix(self.values[rows], self.scales[rows], self.extension)

    @property
    def plain(self) -> "Fp8Matrix":
        """The matrix without the columns of the term."""
        return Fp8Matrix(self.values[:, self.extension :], self.scales)

    @property
    def nbytes(self) -> int:
        return self.values.shape[0] * self.values.stride(0) + self.scales.nbytes

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype) * self.scales.to(dtype)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A weight [N, K]: `by_output` [N, P + K] as X W^T reads it and, where it is there for longer than one product,
    the values once more as dY W reads them, `by_input` [K, P + N], with scales of one, and the `factors` of dY [N]."""

    by_output: Fp8Matrix
    by_input: Fp8Matrix | None = None
    factors: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.by_output.nbytes + sum(0 if part is None else part.nbytes for part in (self.by_input, self.factors))

    def folded_scales(self) -> torch.Tensor:
        """`factors`, made now if need be: the scales in bf16, which has all powers of two, since every row of dY reads
        them."""
        return self.by_output.scales.bfloat16() if self.factors is None else self.factors

    def transposed(self, rank: int) -> Fp8Matrix:
        """`by_input`, made now if need be, with room for a term of that rank."""
        if self.by_input is not None:
            return self.by_input
        source = self.by_output.plain
        rows, columns = source.values.shape
        found = Fp8Matrix.empty(columns, rows, source.values.device, rank=rank)
        transpose_values(source, out=found.plain)
        found.scales.fill_(1.0)
        return found


def extension_width(rank: int) -> int:
    """Columns of a low-rank term: three for each rank, filled up."""
    return -(-3 * rank // _EXTENSION_MULTIPLE) * _EXTENSION_MULTIPLE


def row_bytes(columns: int, rank: int) -> int:
    """Bytes from row to row of a matrix with room for a term of that rank."""
    extension = extension_width(rank)
    return -(-(extension + columns) // _ALIGNMENT) * _ALIGNMENT if extension else columns


def quantize_rows(
    x: torch.Tensor,
    *,
    factors: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    balance: torch.Tensor | None = None,
    at_least: torch.Tensor | None = None,
    out: Fp8Matrix | None = None,
) -> Fp8Matrix:
    """`x [R, C]`, with column j times `factors [C]` (any float dtype) where given, in FP8 with a scale for each row.

    `left [R, r]` and `balance [r]` of `write_right` fill the extension, for which the scales leave room. Rows are
    scaled as if their largest value were `at_least` (fp32 scalar tensor). An `out` with an extension that no `left`
    fills keeps what it holds there.
    """
    rows, columns = x.shape
    rank = 0 if left is None else left.shape[1]
    out = Fp8Matrix.empty(rows, columns, x.device, rank=rank) if out is None else out
    if not use_triton(x):
        _quantize_rows_reference(x, factors, left, balance, at_least, out)
        return out
    if rows == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    if columns > _WIDEST_ROW:
        block, warps = _PIECE, _PIECE_WARPS
    else:
        block = next_power_of_2(columns)
        warps = min(num_warps_for(block), max(block // 2048, 4))
    with launch_on(x):
        _quantize_rows_kernel[(rows,)](
            x, *(out.scales if given is None else given for given in (factors, left, balance, at_least)),
            out.values.view(torch.uint8), out.scales, columns, rank, out.extension,
            x.stride(0), *((0, 0) if left is None else left.stride()), out.values.stride(0),
            HAS_FACTORS=factors is not None, HAS_LEFT=left is not None, HAS_LEAST=at_least is not None, BLOCK=block,
            IN_PIECES=block < columns, RANKS=next_power_of_2(rank), EXTENSION=next_power_of_2(out.extension),
            PTX=compiles_to_ptx(x), num_warps=warps,
        )  # fmt: skip
    return out


def _quantize_rows_reference(
    x: torch.Tensor,
    factors: torch.Tensor | None,
    left: torch.Tensor | None,
    balance: torch.Tensor | None,
    at_least: torch.Tensor | None,
    out: Fp8Matrix,
) -> None:
    """The definition."""
    wide = x.float() if factors is None else x.float() * factors
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    term = None if left is None or balance is None else left.float() * balance
    if term is not None:
        largest = torch.maximum(largest, term.abs().amax(1))
    if at_least is not None:
        largest = torch.maximum(largest, at_least)
    scales = row_scales_reference(largest)
    out.scales.copy_(scales)
    out.plain.values.copy_((wide / scales[:, None]).to(DTYPE))
    if term is not None:
        rank = term.shape[1]
        high, low = split_reference(term / scales[:, None])
        for first, part in enumerate((high, high, low)):
            out.values[:, first * rank : (first + 1) * rank].copy_(part)
        out.values[:, 3 * rank : out.extension].view(torch.uint8).zero_()


def row_scales_reference(largest: torch.Tensor) -> torch.Tensor:
    """The scales of rows with these largest values."""
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent, mantissa in [1/2, 1)
    # 448 = 7/8 2^9; the reciprocal has to be a normal number too.
    exponent = torch.where(mantissa <= LARGEST / 2**9, exponent - 9, exponent - 8).clamp(min=-126)
    scales = ((exponent + 127) << 23).view(torch.float32)  # GPUs' powers of two are not exact
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    return torch.where(largest.isfinite(), scales, torch.nan)


def split_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 numbers of up to 448 as the sum of two of e4m3: the nearest, and the nearest to what it is off by."""
    high = x.to(DTYPE)
    return high, (x - high.float()).to(DTYPE)


def quantize_weight(weight: torch.Tensor, *, out: Fp8Matrix) -> None:
    """A weight `[N, K]` in FP8, beside the extension of `out`."""
    quantize_rows(weight, at_least=largest_magnitude(weight) * _LEAST_PART, out=out)


def largest_magnitude(x: torch.Tensor) -> torch.Tensor:
    """max |x| as an fp32 scalar tensor."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def scaled_matmul(
    left: Fp8Matrix, right: Fp8Matrix, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """L R^T [M, N] of `left [M, K]` and `right [N, K]`, extensions included, in `out` where given."""
    if left.values.is_cuda and use_triton(left.scales):
        target = out if out is not None and out.dtype == torch.bfloat16 else None
        arguments = (left.values, right.values.t(), left.scales[:, None], right.scales[None, :])
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        if target is not None:
            return torch._scaled_mm(*arguments, **options, out=target)
        product = torch._scaled_mm(*arguments, **options).to(dtype)
    else:
        product = scaled_matmul_reference(left, right, dtype)
    return product if out is None else out.copy_(product)


def scaled_matmul_reference(left: Fp8Matrix, right: Fp8Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The definition: the product of the matrices that the payloads stand for, summed in fp32 (float64 for float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    return (left.dequantized(wide) @ right.dequantized(wide).t()).to(dtype)


def transpose_values(matrix: Fp8Matrix, *, out: Fp8Matrix) -> None:
    """Write the transpose of the values [R, C] of `matrix` to those of `out`."""
    values, target = matrix.values.view(torch.uint8), out.values.view(torch.uint8)
    rows, columns = values.shape
    if not use_triton(matrix.scales) or values.numel() == 0:
        target.copy_(values.t())
        return
    grid = (triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))
    with launch_on(target):
        _transpose_kernel[grid](
            values, target, rows, columns, values.stride(0), target.stride(0), TILE=_TILE, num_warps=4
        )


@jit
def _quantize_rows_kernel(
    x_ptr, factors_ptr, left_ptr, balance_ptr, least_ptr, values_ptr, scales_ptr, columns, rank, extension, x_stride,
    left_stride, left_rank_stride, values_stride, HAS_FACTORS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_LEAST: tl.constexpr, BLOCK: tl.constexpr, IN_PIECES: tl.constexpr, RANKS: tl.constexpr,
    EXTENSION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x_row = x_ptr + row * x_stride
    if HAS_LEFT:  # what a row takes first is there when the rest of it is
        ranks = tl.arange(0, RANKS)
        left = tl.load(left_ptr + row * left_stride + ranks * left_rank_stride, mask=ranks < rank, other=0.0)
        left = left.to(tl.float32) * tl.load(balance_ptr + ranks, mask=ranks < rank, other=0.0)
    if IN_PIECES:
        magnitudes = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, columns, BLOCK):
            piece = _scaled_values(x_row, factors_ptr, start + cols, columns, HAS_FACTORS)
            magnitudes = tl.maximum(magnitudes, magnitude_bits(piece))
        largest = tl.max(magnitudes, axis=0)
    else:
        x = _scaled_values(x_row, factors_ptr, cols, columns, HAS_FACTORS)
        largest = tl.max(magnitude_bits(x), axis=0)
    target = values_ptr + row * values_stride
    if HAS_LEAST:
        largest = tl.maximum(largest, magnitude_bits(tl.load(least_ptr)))
    if HAS_LEFT:
        largest = tl.maximum(largest, tl.max(magnitude_bits(left), axis=0))
    scale, reciprocal = row_scale(largest)
    if HAS_LEFT:
        high, low = split(left * reciprocal)
        tl.store(target + ranks, high, mask=ranks < rank)
        tl.store(target + rank + ranks, high, mask=ranks < rank)
        tl.store(target + 2 * rank + ranks, low, mask=ranks < rank)
        rest = tl.arange(0, EXTENSION)
        tl.store(target + rest, tl.zeros((EXTENSION,), tl.uint8), mask=(rest >= 3 * rank) & (rest < extension))
    target += extension
    if IN_PIECES:
        for start in range(0, columns, BLOCK):
            piece = _scaled_values(x_row, factors_ptr, start + cols, columns, HAS_FACTORS)
            tl.store(target + start + cols, to_e4m3(piece * reciprocal, PTX), mask=start + cols < columns)
    else:
        tl.store(target + cols, to_e4m3(x * reciprocal, PTX), mask=cols < columns)
    tl.store(scales_ptr + row, scale)


@jit
def _scaled_values(x_row, factors_ptr, cols, columns, HAS_FACTORS: tl.constexpr):
    """The values of a row in these columns, with the factors of those, in fp32; zeros past the last."""
    x = tl.load(x_row + cols, mask=cols < columns, other=0.0).to(tl.float32)
    if HAS_FACTORS:  # every row reads them
        factors = tl.load(factors_ptr + cols, mask=cols < columns, other=0.0, eviction_policy="evict_last")
        x *= factors.to(tl.float32)
    return x


@jit
def magnitude_bits(x):
    """|x| of fp32 numbers as integers, which keep the order; NaN and infinity come last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def row_scale(largest):
    """(scale, 1 / scale) in fp32 of rows whose largest value has the `magnitude_bits` that are given."""
    # 0x600000 is the mantissa of 7/8: up to it, 448 = 7/8 2^9 reaches; the reciprocal has to be a normal number too.
    exponent = (largest >> 23) - 8 + tl.where((largest & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.where(largest == 0, 127, tl.maximum(exponent, 1))
    scale = tl.where(largest < 0x7F800000, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@jit
def to_e4m3(x, PTX: tl.constexpr):
    """`e4m3_bits`, by the GPU's own conversion where the kernel may hold `PTX`."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if PTX else e4m3_bits(x)


@jit
def e4m3_bits(x):
    """fp32 numbers of up to 448 rounded to e4m3, as its bits in uint8."""
    # To nearest even by integers, in the interpreter too, which rounds some values up to a power of two down to half
    # of it. A GPU's own conversion, of the same bits, is as fast as the memory for many values.
    magnitude = magnitude_bits(x)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9: adding 2^23 steps leaves their number in the last bits.
    steps = (tl.abs(x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < (127 - 6) << 23, steps, normal) | sign).to(tl.uint8)


@jit
def e4m3_value(bits):
    """The fp32 numbers that the bits of e4m3 stand for, but for its NaN."""
    magnitude = bits.to(tl.int32) & 0x7F
    normal = ((magnitude + ((127 - 7) << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)  # a step of 2^-9 below 2^-6
    return tl.where(bits >= 0x80, -value, value)


@jit
def split(x):
    """fp32 numbers of up to 448 as the sum of two of e4m3, in bits: the nearest, and the nearest to what it lacks."""
    high = e4m3_bits(x)
    return high, e4m3_bits(x - e4m3_value(high))


@jit
def _transpose_kernel(x_ptr, y_ptr, rows, columns, x_stride, y_stride, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tile = tl.load(
        x_ptr + i[:, None].to(tl.int64) * x_stride + j[None, :], mask=(i[:, None] < rows) & (j[None, :] < columns)
    )
    tl.store(
        y_ptr + j[:, None].to(tl.int64) * y_stride + i[None, :], tl.trans(tile),
        mask=(j[:, None] < columns) & (i[None, :] < rows),
    )  # fmt: skip

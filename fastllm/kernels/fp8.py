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

Shapes: X [T, K], W [N, K], dY [T, N]; scales [rows]. K and N are multiples of 16.
Dtypes: payloads float8_e4m3fn, scales fp32, sums fp32; results in bf16 from a GPU, in any dtype from the reference.
Rows that hold a NaN or an infinity become NaN. Source: Micikevicius et al., "FP8 Formats for Deep Learning",
arXiv 2209.05433; row-wise scales: torchao's float8 recipes.
"""

from dataclasses import dataclass, replace

import torch

from .dispatch import jit, launch_on, next_power_of_2, num_warps_for, tl, triton, use_triton

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# What the GPUs' products ask of inner and output dimensions.
MULTIPLE = 16
# (major, minor) of the first NVIDIA GPUs with FP8 products.
CAPABILITY = (8, 9)
_TILE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Matrix:
    """`values` float8_e4m3fn [R, C] and `scales` fp32 [R], whose product, row by row, is the matrix. `transposed` holds
    the values as [C, R] too, where a matrix is there for longer than one product."""

    values: torch.Tensor
    scales: torch.Tensor
    transposed: torch.Tensor | None = None

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> "Fp8Matrix":
        values = torch.empty(rows, columns, dtype=torch.uint8, device=device).view(DTYPE)
        return cls(values, torch.empty(rows, dtype=torch.float32, device=device))

    def rows(self, rows: slice) -> "Fp8Matrix":
        return Fp8Matrix(self.values[rows], self.scales[rows])

    @property
    def nbytes(self) -> int:
        held = self.values.nbytes + self.scales.nbytes
        return held if self.transposed is None else held + self.transposed.nbytes

    def with_transposed(self) -> "Fp8Matrix":
        return replace(self, transposed=transposed_values(self))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype) * self.scales.to(dtype)[:, None]


def quantize_rows(x: torch.Tensor, *, factors: torch.Tensor | None = None, out: Fp8Matrix | None = None) -> Fp8Matrix:
    """`x [R, C]`, with column j times `factors [C]` where given, in FP8 with a scale for each row."""
    rows, columns = x.shape
    out = Fp8Matrix.empty(rows, columns, x.device) if out is None else out
    if not use_triton(x):
        values, scales = quantize_rows_reference(x, factors)
        out.values.copy_(values)
        out.scales.copy_(scales)
        return out
    if rows == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    block = next_power_of_2(columns)
    with launch_on(x):
        _quantize_rows_kernel[(rows,)](
            x, x if factors is None else factors, out.values.view(torch.uint8), out.scales, columns,
            x.stride(0), out.values.stride(0), HAS_FACTORS=factors is not None, BLOCK=block,
            num_warps=num_warps_for(block),
        )  # fmt: skip
    return out


def quantize_rows_reference(x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: (values, scales)."""
    wide = x.float() if factors is None else x.float() * factors
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent, mantissa in [1/2, 1)
    # 448 = 7/8 2^9; the reciprocal has to be a normal number too.
    exponent = torch.where(mantissa <= LARGEST / 2**9, exponent - 9, exponent - 8).clamp(min=-126)
    scales = ((exponent + 127) << 23).view(torch.float32)  # GPUs' powers of two are not exact
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    return (wide / scales[:, None]).to(DTYPE), scales


def fp8_linear(
    x: torch.Tensor, weight: Fp8Matrix, *, quantized: Fp8Matrix | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """X W^T [T, N] of `x [T, K]` and `weight [N, K]`, in `out` where given (contiguous). `quantized` is x in FP8, where
    whoever made it did that too."""
    quantized = quantize_rows(x) if quantized is None else quantized
    return scaled_matmul(quantized, weight, x.dtype, out=out, fast_accumulation=True)


def fp8_input_grad(dy: torch.Tensor, weight: Fp8Matrix) -> torch.Tensor:
    """dY W [T, K] of `dy [T, N]` and `weight [N, K]`."""
    folded = quantize_rows(dy, factors=weight.scales)
    ones = torch.ones(weight.values.shape[1], dtype=torch.float32, device=dy.device)
    transposed = transposed_values(weight) if weight.transposed is None else weight.transposed
    return scaled_matmul(folded, Fp8Matrix(transposed, ones), dy.dtype)


def scaled_matmul(
    left: Fp8Matrix,
    right: Fp8Matrix,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
    fast_accumulation: bool = False,
) -> torch.Tensor:
    """L R^T [M, N] of `left [M, K]` and `right [N, K]`. `fast_accumulation` lets the tensor cores of sm_90 sum a little
    less exactly, at full speed."""
    if left.values.is_cuda and use_triton(left.scales):
        target = out if out is not None and out.dtype == torch.bfloat16 else None
        arguments = (left.values, right.values.t(), left.scales[:, None], right.scales[None, :])
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": fast_accumulation}
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


def transposed_values(matrix: Fp8Matrix) -> torch.Tensor:
    """A contiguous copy [C, R] of the transpose of a matrix's values [R, C]."""
    values = matrix.values
    rows, columns = values.shape
    if not use_triton(matrix.scales) or values.numel() == 0:
        return values.view(torch.uint8).t().contiguous().view(DTYPE)
    out = torch.empty(columns, rows, dtype=torch.uint8, device=values.device)
    grid = (triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))
    with launch_on(out):
        _transpose_kernel[grid](
            values.view(torch.uint8), out, rows, columns, values.stride(0), out.stride(0), TILE=_TILE, num_warps=4
        )
    return out.view(DTYPE)


@jit
def _quantize_rows_kernel(
    x_ptr, factors_ptr, values_ptr, scales_ptr, columns, x_stride, values_stride,
    HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    live = cols < columns
    x = tl.load(x_ptr + row * x_stride + cols, mask=live, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        x *= tl.load(factors_ptr + cols, mask=live, other=0.0, eviction_policy="evict_last")  # every row reads them
    scale, reciprocal = row_scale(tl.max(magnitude_bits(x), axis=0))
    tl.store(values_ptr + row * values_stride + cols, e4m3_bits(x * reciprocal), mask=live)
    tl.store(scales_ptr + row, scale)


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
def e4m3_bits(x):
    """fp32 numbers of up to 448 rounded to e4m3, as its bits in uint8."""
    # To nearest even by integers: as fast as the memory, and the same on every target and in the interpreter.
    magnitude = magnitude_bits(x)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9: adding 2^23 steps leaves their number in the last bits.
    steps = (tl.abs(x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < (127 - 6) << 23, steps, normal) | sign).to(tl.uint8)


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

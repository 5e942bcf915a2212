"""4-bit weights of bitsandbytes (NF4, FP4, nested statistics or not), back to a float matrix in one launch.

    w = code[nibble] * absmax,     absmax = code2[a] * absmax2 + offset  for nested statistics

Layout: two values a byte, the high nibble first, in row-major order of W [N, K]; `absmax` per block of `blocksize`
values (64), `absmax2` per `nested_blocksize` entries of absmax (256).
Dtypes: statistics and the product are fp32; the result rounds once. Bitwise equal to bitsandbytes' own dequantisation,
which adds the offset after rounding the product: the kernel therefore runs without fused multiply-add.
Source: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3.
"""

import math
from dataclasses import dataclass, replace

import torch

from .dispatch import compiles_to_ptx, jit, launch_on, tl, triton, use_triton

# 2,048 values a warp: the fastest of the shapes measured on an H200, by little.
_BLOCKS_PER_PROGRAM = 128
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Weight:
    """A quantized matrix as plain tensors.

    `packed` uint8 [N * K / 2]; `absmax` fp32, or uint8 with the nested fields set, [N * K / blocksize]; `code` fp32
    [16]; `nested_absmax` fp32 [len(absmax) / nested_blocksize]; `nested_code` fp32 [256]; `offset` fp32 scalar tensor;
    `compute_dtype` is what the layer multiplies in, None for its input's dtype.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: tuple[int, int]
    blocksize: int
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_blocksize: int = 256
    compute_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def rows_apart(self) -> int:
        """Rows at each multiple of this number begin a block, nested ones too, so that `rows` can begin there; 0 where
        rows end inside of blocks."""
        blocks, rest = divmod(self.shape[1], self.blocksize)
        if rest:
            return 0
        nested = 1 if self.nested_absmax is None else self.nested_blocksize
        return nested // math.gcd(blocks, nested)

    def rows(self, rows: slice) -> "Nf4Weight":
        """These rows, from the first or a multiple of `rows_apart` on, in the same memory."""
        columns = self.shape[1]
        # The last row may end inside a block, and inside a byte.
        blocks = slice(rows.start * columns // self.blocksize, -(-rows.stop * columns // self.blocksize))
        nested = self.nested_absmax
        if nested is not None:
            nested = nested[blocks.start // self.nested_blocksize : -(-blocks.stop // self.nested_blocksize)]
        return replace(
            self, packed=self.packed.flatten()[rows.start * columns // 2 : -(-rows.stop * columns // 2)],
            absmax=self.absmax[blocks], nested_absmax=nested, shape=(rows.stop - rows.start, columns),
        )  # fmt: skip


def dequantize_nf4(weight: Nf4Weight, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The float matrix `[N, K]`, in `out` where given (its rows may be strided, its dtype decides)."""
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    columns = weight.shape[1]
    # The kernel writes whole blocks, each in one piece: one that straddles a row end needs a contiguous target.
    has_whole_blocks = weight.shape[0] * columns % weight.blocksize == 0
    blocks_in_one_piece = columns % weight.blocksize == 0 or out.stride(0) == columns
    if not (use_triton(out) and has_whole_blocks and blocks_in_one_piece):
        return out.copy_(dequantize_nf4_reference(weight, out.dtype))
    num_blocks = weight.packed.numel() * 2 // weight.blocksize
    blocks_per_row = columns // weight.blocksize if columns % weight.blocksize == 0 else num_blocks
    is_nested = weight.nested_absmax is not None
    with launch_on(out):
        _dequantize_kernel[(triton.cdiv(num_blocks, _BLOCKS_PER_PROGRAM),)](
            weight.packed, weight.absmax, weight.code,
            weight.nested_absmax if is_nested else weight.code, weight.nested_code if is_nested else weight.code,
            weight.offset if is_nested else weight.code, out, num_blocks, blocks_per_row, out.stride(0),
            NESTED=is_nested, NESTED_BLOCK=weight.nested_blocksize, HALF=weight.blocksize // 2,
            BLOCKS=_BLOCKS_PER_PROGRAM, PTX=compiles_to_ptx(out), num_warps=_NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def dequantize_nf4_reference(weight: Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The definition: a new matrix `[N, K]`, for any block size, also where rows or the last block end inside one."""
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.nested_code is not None and weight.offset is not None:
        scale2 = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: absmax.numel()]
        absmax = weight.nested_code[absmax.int()] * scale2 + weight.offset
    pairs = torch.stack((weight.code.repeat_interleave(16), weight.code.repeat(16)), dim=-1)  # [256, 2]
    count = weight.shape[0] * weight.shape[1]  # an odd one leaves a nibble over
    values = torch.nn.functional.embedding(weight.packed.flatten().int(), pairs).flatten()[:count]
    full = values.numel() // weight.blocksize * weight.blocksize
    body = values[:full].view(-1, weight.blocksize) * absmax[: full // weight.blocksize, None]
    tail = values[full:] * absmax[full // weight.blocksize :].repeat_interleave(weight.blocksize)[: count - full]
    return torch.cat((body.flatten(), tail)).view(weight.shape).to(dtype)


@jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr,
    num_blocks, blocks_per_row, out_stride,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    live = blocks < num_blocks
    if NESTED:
        index = tl.load(absmax_ptr + blocks, mask=live, other=0).to(tl.int32)
        scale2 = tl.load(absmax2_ptr + blocks // NESTED_BLOCK, mask=live, other=0.0)
        absmax = tl.load(code2_ptr + index) * scale2 + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + blocks, mask=live, other=0.0)
    byte = tl.arange(0, HALF)
    at_bytes = packed_ptr + blocks.to(tl.int64)[:, None] * HALF + byte[None, :]
    packed = tl.load(at_bytes, mask=live[:, None], other=0).to(tl.int32)
    high, low = _values_of(packed, code_ptr, PTX)
    values = tl.interleave(high * absmax[:, None], low * absmax[:, None])  # [BLOCKS, 2 * HALF]
    start = (blocks // blocks_per_row).to(tl.int64) * out_stride + blocks % blocks_per_row * (2 * HALF)
    at = out_ptr + start[:, None] + tl.arange(0, 2 * HALF)[None, :]
    tl.store(at, values.to(out_ptr.dtype.element_ty), mask=live[:, None])


@jit
def _values_of(packed, code_ptr, PTX: tl.constexpr):
    """Entries of the code [16] for the high and the low nibbles of bytes."""
    if PTX:
        # Each half of a warp holds the code, an entry a lane, and lanes read each other's: no address, no cache.
        entry = tl.inline_asm_elementwise(
            """{
            .reg .u32 lane;
            .reg .u64 at;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mul.wide.u32 at, lane, 4;
            add.u64 at, at, $1;
            ld.global.nc.f32 $0, [at];
            }""",
            "=f,l", [code_ptr.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 high;
            shr.u32 high, $2, 4;
            shfl.sync.idx.b32 $0, $3, high, 31, -1;
            shfl.sync.idx.b32 $1, $3, $2, 31, -1;
            }""",
            "=f,=f,r,f", [packed, entry], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 15))

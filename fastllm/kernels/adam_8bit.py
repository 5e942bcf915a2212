"""AdamW with 8-bit states, in place and in one launch: bitsandbytes' blockwise update of the optimizer "adam".

    s1 = beta1 * s1 + (1 - beta1) * g                 c1 = 1 - beta1^step
    s2 = beta2 * s2 + (1 - beta2) * g^2               c2 = sqrt(1 - beta2^step)
    p  = round(p - lr * c2 / c1 * s1 / (sqrt(s2) + c2 * eps)),     then  p = round(p * (1 - lr * weight_decay))

Layout: a state is a code, uint8, for each value and a scale `absmax`, fp32, for each 256 values in row-major order: the
value is map[code] * absmax, and absmax becomes the largest magnitude in the block. The maps are bitsandbytes' dynamic
ones, ascending fp32 [256], signed for state 1 and unsigned for state 2.
Codes: the nearest to s / absmax, the even one where two are as near. A negative s1 never gets the code of zero, nor one
on the other side. A block of nothing but zeros has codes 255 in state 1 (0 where s1 is -0) and 0 in state 2. Where g is
not finite, both states become zero and p stays.
Dtypes: p and g fp32, bf16 or fp16; arithmetic in fp32.
Bits: sums and products are those of bitsandbytes' CUDA kernel in its order, fused where its machine code fuses them
(0.50.2, sm_90), with the same approximations of 1/x, sqrt, exp2 and log2. On an H100 parameters, codes and absmax have
the same bits (1.2 G values, ten steps, each dtype), but for states below 2^-126 or above 2^126 and blocks in which g^2
overflows; other NVIDIA GPUs are meant to. The reference rounds exactly: c2 is then up to 1e-4 away in the first steps
(as the GPU's log2 of 0.999 is), the last bits of states differ, and of 100,000 codes one or so that lies between two.
Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; Dettmers, "8-Bit
Approximations for Parallelism in Deep Learning", arXiv 1511.04561, for the maps.
"""

import torch

from .dispatch import compiles_to_ptx, jit, launch_on, tl, triton, use_triton

BLOCK = 256
_BLOCKS_PER_PROGRAM = 4
_NUM_WARPS = 2
_DECADES = 7


def adam_8bit(
    p: torch.Tensor,
    gradient: torch.Tensor,
    codes: tuple[torch.Tensor, torch.Tensor],
    absmax: tuple[torch.Tensor, torch.Tensor],
    tables: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update `p`, its two `codes` (uint8, as many as p has values) and `absmax` (fp32, one a block) in place.

    All are contiguous, and of any shape; `tables` is what `code_tables` gives, `step` counts from 1.
    """
    if not use_triton(p):
        adam_8bit_reference(
            p, gradient, codes, absmax, tables, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
    elif p.numel():
        with launch_on(p):
            _adam_8bit_kernel[(triton.cdiv(p.numel(), BLOCK * _BLOCKS_PER_PROGRAM),)](
                p, gradient, *codes, *absmax, tables, p.numel(),
                float(step), lr, *betas, eps, weight_decay,
                HAS_DECAY=weight_decay > 0, PTX=compiles_to_ptx(p), BLOCKS=_BLOCKS_PER_PROGRAM, BLOCK=BLOCK,
                num_warps=_NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


def adam_8bit_reference(
    p: torch.Tensor,
    gradient: torch.Tensor,
    codes: tuple[torch.Tensor, torch.Tensor],
    absmax: tuple[torch.Tensor, torch.Tensor],
    tables: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The definition: as `adam_8bit`."""
    map1, thresholds1, map2, thresholds2 = tables
    # As C floats: 1 - beta2 of 0.999 is off by 1e-5 that way, which the states of bitsandbytes have in them.
    rate, beta1, beta2, least, decay = torch.tensor([lr, *betas, eps, weight_decay], device=p.device).unbind()
    c1, c2 = 1 - beta1.double() ** step, (1 - beta2.double() ** step).sqrt()
    g = _in_blocks(gradient, 0.0).float()
    finite = g.isfinite()
    s1, s2 = (
        m[_in_blocks(code, zero).int()] * scale[:, None]
        for m, code, scale, zero in zip((map1, map2), codes, absmax, (127, 0), strict=True)
    )
    s1 = torch.where(finite, _fma(g, 1 - beta1, s1 * beta1), 0.0)
    s2 = torch.where(finite, _fma(g, g * (1 - beta2), s2 * beta2), 0.0)
    update = s1 / _fma(c2, least, s2.sqrt())
    values = _in_blocks(p, 0.0)
    updated = _fma((-rate * c2 / c1).float(), update, values.float()).to(p.dtype)
    if weight_decay > 0:
        updated = (updated.float() * _fma(-rate, decay, torch.ones_like(rate))).to(p.dtype)
    p.copy_(_out_of_blocks(torch.where(finite, updated, values), p))
    negative = torch.signbit(s1)
    x1, absmax1 = _scaled(s1, torch.where(negative, -1.0, 1.0))
    x2, absmax2 = _scaled(s2, torch.zeros_like(s2))
    code1, code2 = (torch.searchsorted(t[:-1].contiguous(), x) for t, x in ((thresholds1, x1), (thresholds2, x2)))
    code1 = torch.where(negative, code1.clamp(max=126), code1)
    for target, value in zip((*codes, *absmax), (code1, code2, absmax1, absmax2), strict=True):
        target.copy_(_out_of_blocks(value, target))


def code_tables(map1: torch.Tensor, map2: torch.Tensor) -> torch.Tensor | None:
    """Rows of `[4, 256]` fp32: the map of state 1, its thresholds, the map of state 2, its thresholds.

    The code of x is the number of thresholds below x: midpoints of neighbours, where the even neighbour is the higher
    one the float before. None for maps other than bitsandbytes' signed and unsigned dynamic ones, which the kernel
    relies on.
    """
    unsigned, positive = _dynamic_map(2), _dynamic_map(1)
    signed = torch.cat((-positive[1:-1].flip(0), positive))
    for given, expected in ((map1, signed), (map2, unsigned)):
        if given.shape != expected.shape or not torch.allclose(given.double().cpu(), expected, rtol=1e-5, atol=0.0):
            return None
    return torch.stack((map1, _thresholds(map1), map2, _thresholds(map2)))


def _dynamic_map(first_bins: int) -> torch.Tensor:
    """Zero, seven decades from 1e-7 to 1, each cut into twice as many bins as the one before, and one: the midpoints of
    the bins, float64 `[127 * first_bins + 2]`."""
    bins = [first_bins * 2**i for i in range(_DECADES)]
    decades = [
        10.0 ** (i - _DECADES + 1) * (0.1 + 0.9 * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
        for i, n in enumerate(bins)
    ]
    return torch.cat((torch.zeros(1), *decades, torch.ones(1)))


def _thresholds(ascending: torch.Tensor) -> torch.Tensor:
    """255 thresholds between the values of a map, and infinity."""
    midpoints = (ascending[:-1] + ascending[1:]) * 0.5
    infinity = torch.full_like(midpoints[:1], torch.inf)
    midpoints[1::2] = torch.nextafter(midpoints[1::2], -infinity)
    return torch.cat((midpoints, infinity))


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in fp32 with one rounding, but for what a second one from float64 does once in 2^29."""
    return torch.addcmul(c.double(), a.double(), b.double()).float()


def _in_blocks(flat: torch.Tensor, padding: float) -> torch.Tensor:
    return torch.nn.functional.pad(flat.flatten(), (0, -flat.numel() % BLOCK), value=padding).view(-1, BLOCK)


def _out_of_blocks(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return blocks.flatten()[: like.numel()].view(like.shape)


def _scaled(s: torch.Tensor, of_zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """s / absmax, or `of_zeros` in blocks of zeros, and absmax."""
    absmax = s.abs().amax(dim=1, keepdim=True)
    absmax = torch.where(absmax < torch.finfo(torch.float32).tiny, 0.0, absmax)
    x = s * (1 / absmax)
    return torch.where(x.isnan(), of_zeros, x), absmax


@jit
def _adam_8bit_kernel(
    p_ptr, g_ptr, code1_ptr, code2_ptr, absmax1_ptr, absmax2_ptr, tables_ptr, size,
    step, lr, beta1, beta2, eps, weight_decay,
    HAS_DECAY: tl.constexpr, PTX: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    beta1, beta2 = tl.cast(beta1, tl.float32), tl.cast(beta2, tl.float32)  # Triton's interpreter has Python's floats
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    live, live_blocks = at < size, blocks * BLOCK < size
    # Past the end are the codes of zero.
    code1 = tl.load(code1_ptr + at, mask=live, other=127).to(tl.int32)
    code2 = tl.load(code2_ptr + at, mask=live, other=0).to(tl.int32)
    absmax1 = tl.load(absmax1_ptr + blocks, mask=live_blocks, other=0.0)
    absmax2 = tl.load(absmax2_ptr + blocks, mask=live_blocks, other=0.0)
    g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + at, mask=live, other=0.0)
    finite = tl.abs(g) < float("inf")
    s1 = _look_up(tables_ptr, code1) * absmax1[:, None]
    s2 = _look_up(tables_ptr + 2 * 256, code2) * absmax2[:, None]
    s1 = tl.where(finite, tl.fma(g, 1.0 - beta1, s1 * beta1), 0.0)
    g2 = g * (1.0 - beta2)
    # Which of the products is rounded before the sum is bitsandbytes' compiler's choice.
    s2 = tl.fma(g, g2, s2 * beta2) if g_ptr.dtype.element_ty == tl.float32 else tl.fma(s2, beta2, g * g2)
    s2 = tl.where(finite, s2, 0.0)

    c1 = 1.0 - tl.exp2(step * _log2(beta1, PTX))
    c2 = tl.sqrt(1.0 - tl.exp2(step * _log2(beta2, PTX)))
    step_size = c2 * lr * -(1.0 / c1)
    update = s1 * (1.0 / tl.fma(c2, eps, tl.sqrt(s2)))
    updated = tl.fma(step_size, update, p.to(tl.float32)).to(p.dtype)
    if HAS_DECAY:
        updated = (updated.to(tl.float32) * tl.fma(-lr, weight_decay, 1.0)).to(p.dtype)
    tl.store(p_ptr + at, tl.where(finite, updated, p), mask=live)

    x1, absmax1 = _magnitude_in_block(s1)
    x2, absmax2 = _magnitude_in_block(s2)
    x1 = tl.where((absmax1 == 0.0)[:, None], 1.0, x1)
    step1 = _nearest(x1, tables_ptr + 256 + 127, 1)  # the map of state 1 is symmetric, with zero at 127
    negative = s1.to(tl.int32, bitcast=True) < 0
    code1 = 127 + tl.where(negative, -tl.minimum(tl.maximum(step1, 1), 127), step1)
    code2 = _nearest(x2, tables_ptr + 3 * 256, 2)
    tl.store(code1_ptr + at, code1.to(tl.uint8), mask=live)
    tl.store(code2_ptr + at, code2.to(tl.uint8), mask=live)
    tl.store(absmax1_ptr + blocks, absmax1, mask=live_blocks)
    tl.store(absmax2_ptr + blocks, absmax2, mask=live_blocks)


@jit
def _log2(x, PTX: tl.constexpr):
    """Where it can be had, the approximation in bitsandbytes' powers of beta; `tl.log2` is exact to the last bit."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@jit
def _magnitude_in_block(s):
    """|s| / absmax, or zero where that is; absmax."""
    s = tl.abs(s)
    absmax = tl.max(s, axis=1)
    absmax = tl.where(absmax < 2.0**-126, 0.0, absmax)
    return s * tl.where(absmax == 0.0, 0.0, 1.0 / absmax)[:, None], absmax


@jit
def _nearest(x, thresholds_ptr, FIRST_BINS: tl.constexpr):
    """How many thresholds lie below x >= 0: the nearest code of a dynamic map, counted from that of zero.

    Within a decade the count grows linearly with x, and each decade has twice the bins of the one before at ten times
    the width. So the count is near the least of seven lines, whose slopes fall by five and which meet at the ends of
    decades. Thresholds are midpoints of values: some lie a quarter of a bin before the end of one or a fifth behind it.
    With half a bin taken off, the lines give the count or one less, and one look into the table decides.
    """
    slope: tl.constexpr = FIRST_BINS * 1e6 / 0.9
    offset: tl.constexpr = FIRST_BINS * 8 / 9
    start: tl.constexpr = 0.5 - FIRST_BINS
    lines = tl.fma(x, slope, start + offset)
    for decade in tl.static_range(1, 7):  # pyright: ignore[reportGeneralTypeIssues]
        lines = tl.minimum(lines, tl.fma(x, slope / 5**decade, start + offset * 2**decade))
    limit: tl.constexpr = 127.0 * FIRST_BINS
    count = tl.where(lines < limit, lines, limit).to(tl.int32)  # not a minimum, for NaN has to stay in the table too
    return count + (x > _look_up(thresholds_ptr, count)).to(tl.int32)


@jit
def _look_up(table_ptr, index):
    """Entries of a table of 256, by way of shared memory: reads through the cache take a fifth longer."""
    table = tl.load(table_ptr + tl.arange(0, 256))
    shape: tl.constexpr = index.shape
    return tl.reshape(tl.gather(table, tl.reshape(index, (index.numel,)), 0), shape)

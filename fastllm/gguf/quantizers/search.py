"""Least-squares searches for the scales of a block, for all blocks at once.

A block of K weights x has S sub-blocks of B weights; tensors are [S, B, N] with the N blocks last, so that every sum
over a sub-block is an element-wise sum of long vectors. `w` weights the squared errors. All arithmetic is fp32.

The method is the same for every type:
1. try a few scales a sub-block; for each, the codes are the nearest grid points and the best scale for those codes
   has a closed form; keep the scale with the least error (`fit_*`);
2. where sub-block scales are stored as integers times a scale of the block: round them, try their neighbours on the
   grid that will really be stored, solve for the block's scale in closed form, and repeat (`search_*`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .grids import Grid

_ROUNDS = 3  # times that scales are rounded and solved for again; more gain less than 0.1 % of the error
_NEIGHBOURS = (0, -1, 1)
# First scales of a signed grid, as (factor, offset): the weight of largest magnitude maps to factor * low - offset.
# About the low end, beyond it (which clips an outlier), and with the other sign (grids are not symmetric).
_SIGNED_TRIALS = (
    *((1.0, offset) for offset in (0.0, -0.9, -0.6, -0.4, -0.2, 0.2, 0.4, 0.6, 0.9)),
    *((factor, 0.0) for factor in (0.92, 1.05, 1.1, 1.15, 1.2)),
    *((factor, 0.0) for factor in (-0.8, -0.875, -0.95, -1.025, -1.1)),
)
# First scales of 0..levels, as (factor, offset, anchor): the range of the weights maps to factor * levels + offset
# steps, and its end that keeps its place is the low one (0), the high one (1) or the middle (0.5). A factor above 1
# clips the other end.
_AFFINE_TRIALS = (
    *((1.0, offset, 0.0) for offset in (0.0, -0.8, -0.3, 0.3, 0.8)),
    *((1.0, offset, 1.0) for offset in (-0.8, -0.3, 0.3, 0.8)),
    (1.15, 0.0, 0.0),
    (1.15, 0.0, 1.0),
    (1.3, 0.0, 0.5),
)
_TINY = 1e-30
_EQUAL = 1e-9  # errors whose difference is this part of the weights' energy are equal up to rounding
_SINGULAR = 1e-6  # of a determinant, relative to the product that it is the difference of


@dataclass(frozen=True, slots=True)
class Samples:
    """The weights of N blocks, their error weights and the sums that every fit needs."""

    x: torch.Tensor  # [S, B, N]
    w: torch.Tensor | None  # [S, B, N]; None: all 1
    wx: torch.Tensor  # [S, B, N]
    sum_w: torch.Tensor  # [S, 1, N]
    sum_wx: torch.Tensor  # [S, 1, N]
    slack: torch.Tensor  # [S, 1, N]: a difference of errors that is only rounding

    @classmethod
    def of(cls, rows: torch.Tensor, importance: torch.Tensor | None, num_sub: int, size: int) -> Samples:
        """Samples of fp32 rows [R, C] and the importance [C] of their columns."""
        x = rows.reshape(-1, num_sub * size).t().contiguous().view(num_sub, size, -1)
        if importance is None:
            w, wx, sum_w = None, x, x.new_full((num_sub, 1, 1), size)
        else:
            columns = importance.view(-1, num_sub * size).t().reshape(num_sub, size, 1, -1)
            w = columns.expand(-1, -1, rows.shape[0], -1).reshape(x.shape)
            wx, sum_w = w * x, w.sum(1, keepdim=True)
        slack = _EQUAL * (wx * x).sum(1, keepdim=True)
        return cls(x, w, wx, sum_w, wx.sum(1, keepdim=True), slack)

    def weighted_sum(self, values: torch.Tensor) -> torch.Tensor:
        """sum w v per sub-block. May overwrite the values."""
        return (values if self.w is None else values.mul_(self.w)).sum(1, keepdim=True)

    def error(self, y: torch.Tensor) -> torch.Tensor:
        """sum w (y - x)^2 per sub-block. Overwrites y."""
        return self.weighted_sum(y.sub_(self.x).square_())


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is 0 or too small to have an inverse."""
    return torch.where(scale.abs() > _TINY, 1 / scale, 0)


def round_to_f16(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


def ratio(numerator: torch.Tensor, denominator: torch.Tensor, otherwise: torch.Tensor | float) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator, otherwise)


def keep_better(
    slack: torch.Tensor, best: tuple[torch.Tensor, ...] | None, candidate: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Per element the tuple with the lower first entry, its error; the earlier one where they are equal."""
    if best is None:
        return candidate
    better = candidate[0] + slack < best[0]
    return tuple(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))


# --- x ~ s * q, with q on a signed grid ------------------------------------------------------------------------------


def _signed_sums(samples: Samples, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum w x q, sum w q^2) per sub-block; their ratio is the scale of least error for given q."""
    return (samples.wx * q).sum(1, keepdim=True), samples.weighted_sum(q * q)


def fit_signed(samples: Samples, grid: Grid) -> torch.Tensor:
    """The best of the trial scales per sub-block: fp32 [S, 1, N], of either sign."""
    low, high = samples.x.amin(1, keepdim=True), samples.x.amax(1, keepdim=True)
    unit = inverse(torch.where(high > -low, high, low))
    best = None
    for factor, offset in _SIGNED_TRIALS:
        q = grid.nearest(samples.x * ((factor * grid.low - offset) * unit))
        scale = ratio(*_signed_sums(samples, q), 0.0)
        best = keep_better(samples.slack, best, (samples.error(q.mul_(scale)), scale))
    assert best is not None
    return best[1]


def search_signed_block(samples: Samples, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """One f16 scale per block (S = 1). Returns (scale [1, 1, N], q [1, B, N])."""
    scale = round_to_f16(fit_signed(samples, grid))
    best = None
    for _ in range(_ROUNDS):
        q = grid.nearest(samples.x * inverse(scale))
        solved = ratio(*_signed_sums(samples, q), 0.0)
        best = keep_better(samples.slack, best, (samples.error(q.mul_(scale)), scale))
        scale = round_to_f16(solved)
    assert best is not None
    return best[1], grid.nearest(samples.x * inverse(best[1]))


def search_signed_super(
    samples: Samples, grid: Grid, lowest: int, highest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x ~ d * k * q with one f16 d a block and one integer k in [lowest, highest] a sub-block.

    Returns: (d [1, 1, N], k [S, 1, N], q [S, B, N]).
    """
    scale = fit_signed(samples, grid)
    high, low = scale.amax(0, keepdim=True), scale.amin(0, keepdim=True)
    d = round_to_f16(torch.where(high > -low, high, low) / lowest)
    slack = samples.slack.sum(0, keepdim=True)
    best = None
    for _ in range(_ROUNDS):
        error, k, sum_xq, sum_qq = _search_signed_steps(samples, grid, d, scale, lowest, highest)
        best = keep_better(slack, best, (error.sum(0, keepdim=True), d, k))
        d = round_to_f16(ratio((k * sum_xq).sum(0, keepdim=True), (k * k * sum_qq).sum(0, keepdim=True), d))
        scale = ratio(sum_xq, sum_qq, 0.0)
    assert best is not None
    _, d, k = best
    return d, k, grid.nearest(samples.x * inverse(d * k))


def _search_signed_steps(
    samples: Samples, grid: Grid, d: torch.Tensor, scale: torch.Tensor, lowest: int, highest: int
) -> tuple[torch.Tensor, ...]:
    """(error, k, sum w x q, sum w q^2) of the best k per sub-block about scale / d."""
    nearest = (scale * inverse(d)).round_()
    best = None
    for step in _NEIGHBOURS:
        k = (nearest + step).clamp_(lowest, highest)
        s = d * k
        q = grid.nearest(samples.x * inverse(s))
        sum_xq, sum_qq = _signed_sums(samples, q)
        best = keep_better(samples.slack, best, (samples.error(q.mul_(s)), k, sum_xq, sum_qq))
    assert best is not None
    return best


# --- x ~ s * q - m, with q in 0..levels ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _AffineSums:
    """Sums over a sub-block for given codes: w q, w q^2 and w x q."""

    q: torch.Tensor
    qq: torch.Tensor
    xq: torch.Tensor

    @classmethod
    def of(cls, samples: Samples, q: torch.Tensor) -> _AffineSums:
        wq = q if samples.w is None else samples.w * q
        return cls(
            q=wq.sum(1, keepdim=True),
            qq=(wq * q).sum(1, keepdim=True),
            xq=(wq * samples.x).sum(1, keepdim=True),
        )


def affine_codes(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: int) -> torch.Tensor:
    """The nearest q in 0..levels of (x + m) / s."""
    return (x + minimum).mul_(inverse(scale)).round_().clamp_(0, levels)


def _affine_error(samples: Samples, q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """sum w (s q - m - x)^2 per sub-block. Overwrites q."""
    return samples.error(q.mul_(scale).sub_(minimum))


def _solve_affine(samples: Samples, sums: _AffineSums, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The (scale, minimum) of least error for given codes; minimum >= 0 unless `signed`."""
    product = samples.sum_w * sums.qq
    determinant = product - sums.q * sums.q
    scale = ratio(samples.sum_w * sums.xq - samples.sum_wx * sums.q, determinant, 0.0)
    minimum = ratio(sums.q * sums.xq - samples.sum_wx * sums.qq, determinant, 0.0)
    solved = determinant > _SINGULAR * product
    if not signed:
        solved &= minimum >= 0
    return torch.where(solved, scale, ratio(sums.xq, sums.qq, 0.0)), torch.where(solved, minimum, 0.0)


def fit_affine(samples: Samples, levels: int, signed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the trial scales per sub-block. Returns (scale, minimum), both [S, 1, N]."""
    low, high = samples.x.amin(1, keepdim=True), samples.x.amax(1, keepdim=True)
    if not signed:
        low = low.clamp_max(0)
    unit = inverse(high - low)
    best = None
    for factor, offset, anchor in _AFFINE_TRIALS:
        spread = factor * levels + offset
        q = (samples.x - low).mul_(spread * unit).add_(anchor * (levels - spread)).round_().clamp_(0, levels)
        scale, minimum = _solve_affine(samples, _AffineSums.of(samples, q), signed)
        best = keep_better(samples.slack, best, (_affine_error(samples, q, scale, minimum), scale, minimum))
    assert best is not None
    return best[1], best[2]


def search_affine_block(samples: Samples, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One f16 scale and one f16 minimum of either sign per block (S = 1).

    Returns: (scale [1, 1, N], minimum [1, 1, N], q [1, B, N]) of x ~ scale * q - minimum.
    """
    scale, minimum = map(round_to_f16, fit_affine(samples, levels, signed=True))
    best = None
    for _ in range(_ROUNDS):
        q = affine_codes(samples.x, scale, minimum, levels)
        sums = _AffineSums.of(samples, q)
        # For the scale as it is rounded, the minimum has a better value than the one of the joint fit.
        minimum = round_to_f16((scale * sums.q - samples.sum_wx) / samples.sum_w)
        best = keep_better(samples.slack, best, (_affine_error(samples, q, scale, minimum), scale, minimum))
        scale, minimum = map(round_to_f16, _solve_affine(samples, sums, signed=True))
    assert best is not None
    _, scale, minimum = best
    return scale, minimum, affine_codes(samples.x, scale, minimum, levels)


def search_affine_super(
    samples: Samples, levels: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x ~ d * k * q - dmin * j with f16 d and dmin >= 0 a block, integers k and j in 0..steps a sub-block.

    Returns: (d [1, 1, N], dmin [1, 1, N], k [S, 1, N], j [S, 1, N], q [S, B, N]).
    """
    scale, minimum = fit_affine(samples, levels)
    d = round_to_f16(scale.amax(0, keepdim=True) / steps)
    dmin = round_to_f16(minimum.amax(0, keepdim=True) / steps)
    slack = samples.slack.sum(0, keepdim=True)
    best = None
    for _ in range(_ROUNDS):
        error, k, j, sums = _search_affine_steps(samples, d, dmin, scale, minimum, levels, steps)
        best = keep_better(slack, best, (error.sum(0, keepdim=True), d, dmin, k, j))
        scale, _ = _solve_affine(samples, sums, signed=False)
        d, dmin = _solve_block_scales(samples, sums, d, dmin, k, j)
        minimum = (d * (scale * inverse(d)).round_() * sums.q - samples.sum_wx) / samples.sum_w
    assert best is not None
    _, d, dmin, k, j = best
    return d, dmin, k, j, affine_codes(samples.x, d * k, dmin * j, levels)


def _search_affine_steps(
    samples: Samples,
    d: torch.Tensor,
    dmin: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    levels: int,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _AffineSums]:
    """The best (k, j) per sub-block about (scale / d, minimum / dmin), with its error and sums.

    j is not searched but solved for: given k and codes, the best minimum has a closed form.
    """
    per_d, per_dmin = inverse(d), inverse(dmin)
    nearest = (scale * per_d).round_()
    guess = dmin * (minimum * per_dmin).round_().clamp_(0, steps)
    best = None
    for step in _NEIGHBOURS:
        k = (nearest + step).clamp_(0, steps)
        s = d * k
        sum_q = samples.weighted_sum(affine_codes(samples.x, s, guess, levels))
        j = ((s * sum_q - samples.sum_wx) / samples.sum_w * per_dmin).round_().clamp_(0, steps)
        m = dmin * j
        q = affine_codes(samples.x, s, m, levels)
        sums = _AffineSums.of(samples, q)
        error = _affine_error(samples, q, s, m)
        best = keep_better(samples.slack, best, (error, k, j, sums.q, sums.qq, sums.xq))
    assert best is not None
    error, k, j, *sums = best
    return error, k, j, _AffineSums(*sums)


def _solve_block_scales(
    samples: Samples, sums: _AffineSums, d: torch.Tensor, dmin: torch.Tensor, k: torch.Tensor, j: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The f16 (d, dmin) of least error over the block for given k, j and codes: a 2 x 2 linear system."""
    kk = (k * k * sums.qq).sum(0, keepdim=True)
    kj = (k * j * sums.q).sum(0, keepdim=True)
    jj = (j * j * samples.sum_w).sum(0, keepdim=True)
    kx = (k * sums.xq).sum(0, keepdim=True)
    jx = (j * samples.sum_wx).sum(0, keepdim=True)
    determinant = kk * jj - kj * kj
    solved_d, solved_dmin = ratio(kx * jj - jx * kj, determinant, 0.0), ratio(kx * kj - jx * kk, determinant, 0.0)
    solved = (determinant > _SINGULAR * kk * jj) & (solved_d > 0) & (solved_dmin >= 0)
    alone = ratio(kx + dmin * kj, kk, d).clamp_min(0)
    return round_to_f16(torch.where(solved, solved_d, alone)), round_to_f16(torch.where(solved, solved_dmin, dmin))

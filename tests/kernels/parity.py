"""The numeric standard of the kernel tests.

Truth is the op's formula in float64, on inputs and upstream gradients already rounded to the tested dtype. Every check
compares three errors: ours, that of the same formula as Hugging Face writes it, run in the tested dtype (`eager.py`),
and the rounding floor, which is the error of the truth rounded once.

    rel_l2  = |y - r| / |r|               limit: a multiple of the floor (16-bit) or a figure (fp32)
    rel_max = max|y - r| / max|r|         limit: eager's or the floor's (16-bit), twice eager's or the figure (fp32)
    bias    = |mean(y - r)| / rms(r)      limit: four standard errors, eager's or 1e-6

Standard errors count independent errors: rows of the truth that are the same row have the same ones. Of few independent
errors, eager's rel_l2 is itself known only to its standard error, three of which are granted where rows repeat.

There is no absolute tolerance, but for results that are zero because equal terms cancel (`Limit.zero`). The form of the
rule is FlashAttention's: an error is judged by the error that plain PyTorch makes on the same numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastllm.kernels.dispatch import backend

# The relative L2 error of one rounding to nearest, for values without structure.
ROUNDING_FLOOR = {torch.float32: 2.53e-8, torch.float16: 2.08e-4, torch.bfloat16: 1.66e-3}
# A sum has as many fp32 results as orders of summation; neither ours nor eager's order is privileged.
FP32_REL_MAX_FACTOR = 2.0
# An fp32 result within a hair of the midpoint of two 16-bit values may round to the other one.
DOUBLE_ROUNDING = 1.01

Tensors = Mapping[str, torch.Tensor]


class OverLimit(AssertionError):
    """An error above its limit. Planted bugs have to raise exactly this."""


class Biased(OverLimit):
    """A mean error of more than four standard errors. One in 16,000 is that by chance, and not again."""


@dataclass(frozen=True)
class Limit:
    """Largest rel_l2: `floors` times the rounding floor in fp16 and bf16, `fp32` in fp32.

    For ops that round in between: `eager` is the multiple of eager's own rel_l2 that passes too, `rel_max` the factor
    on eager's rel_max, whose largest of few unlucky roundings is a matter of chance. `zero` is how many times the
    dtype's epsilon a value may be where the truth is zero throughout.
    """

    floors: float
    fp32: float
    eager: float = 0.0
    rel_max: float = 1.0
    zero: float = 0.0


@dataclass(frozen=True)
class Errors:
    rel_l2: float
    rel_max: float
    bias: float


@dataclass
class Setting:
    """One way to run an op: which implementation, in which dtype, on which device; and its random numbers."""

    implementation: str
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @contextmanager
    def active(self) -> Iterator[None]:
        with backend(self.implementation):
            yield

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers, drawn on the CPU so that every device sees the same ones, rounded to the tested dtype."""
        drawn = torch.randn(*shape, generator=self.generator) * scale
        return drawn.to(self.device, self.dtype).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


def errors_of(value: torch.Tensor, truth: torch.Tensor) -> Errors:
    difference = value.double() - truth
    norm, largest = truth.norm(), truth.abs().max()
    rms = norm / truth.numel() ** 0.5
    return Errors((difference.norm() / norm).item(), (difference.abs().max() / largest).item(),
                  (difference.mean().abs() / rms).item())  # fmt: skip


def independent_values(truth: torch.Tensor) -> int:
    """How many of the truth's values are rounded independently: those of its distinct rows."""
    if truth.dim() < 2 or not truth.shape[-1]:
        return truth.numel()
    return torch.unique(truth.flatten(0, -2), dim=0).numel()


def assert_parity(
    name: str,
    value: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    limit: Limit,
    *,
    computed_in: torch.dtype | None = None,
) -> None:
    """Raise `OverLimit` where `value` is further from `truth` (float64) than `limit` allows.

    `computed_in` names the coarsest dtype on the way, where that is not value's own: its floor then counts.
    """
    if value.shape != truth.shape:
        raise OverLimit(f"{name}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
    if value.numel() == 0:
        return
    if not truth.isfinite().all():
        raise ValueError(f"{name}: the truth is not finite; choose other inputs")
    if not truth.any():
        largest = value.abs().max().item()
        if not largest <= limit.zero * torch.finfo(value.dtype).eps:
            raise OverLimit(f"{name}: expected zeros, got up to {largest:.2e}")
        return
    dtype = computed_in or value.dtype
    ours, theirs, floor = (errors_of(t, truth) for t in (value, eager, truth.to(dtype)))
    independent = independent_values(truth)
    luck = 3 * (2 * independent) ** -0.5 if independent < truth.numel() else 0.0
    if dtype == torch.float32:
        rel_l2 = max(limit.fp32, limit.eager * theirs.rel_l2)
        rel_max = FP32_REL_MAX_FACTOR * max(theirs.rel_max, limit.fp32)
    else:
        rel_l2 = max(limit.floors * max(floor.rel_l2, ROUNDING_FLOOR[dtype]), limit.eager * (1 + luck) * theirs.rel_l2)
        rel_max = DOUBLE_ROUNDING * max(theirs.rel_max, floor.rel_max)
    standard_error = ours.rel_l2 / independent**0.5
    bias = max(4 * standard_error, theirs.bias * DOUBLE_ROUNDING, floor.bias * DOUBLE_ROUNDING, 1e-6)
    allowed = Errors(rel_l2, limit.rel_max * rel_max, bias)
    for metric in ("rel_l2", "rel_max", "bias"):
        error, most = getattr(ours, metric), getattr(allowed, metric)
        if not error <= most:  # also where the error is NaN
            raise (Biased if metric == "bias" else OverLimit)(
                f"{name}: {metric} {error:.3e} > {most:.3e} in {dtype} "
                f"(eager {getattr(theirs, metric):.3e}, floor {getattr(floor, metric):.3e}, n = {truth.numel()})"
            )


Op = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def run(op: Op, inputs: Tensors, upstream: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """`op(**inputs)` and its backward: outputs as y, y1, ..., gradients as d<input>."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, upstream)
    found = {f"y{i or ''}": out.detach() for i, out in enumerate(outputs)}
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def wide(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def check_op(
    op: Op,
    eager: Op,
    setting: Setting,
    inputs: Tensors,
    limits: Mapping[str, Limit],
    *,
    upstream: tuple[torch.Tensor, ...],
    computed_in: torch.dtype | None = None,
) -> tuple[Tensors, Tensors, Tensors]:
    """Forward and every gradient of `op` against `eager` in float64. `limits` names every output and gradient;
    gradients with a dtype finer than `computed_in` are measured by the floor of that.

    Also: gradients have the dtype and shape of their input, and inputs and upstream gradients are left as they were.
    Returns: ours, eager's and the true outputs and gradients.
    """
    before = {name: t.clone() for name, t in inputs.items()}
    upstream_before = tuple(t.clone() for t in upstream)
    with setting.active():
        ours = run(op, inputs, upstream)
    for name, tensor in inputs.items():
        assert tensor.equal(before[name]), f"the op overwrote its input {name}"
        if f"d{name}" in ours:
            assert ours[f"d{name}"].dtype == tensor.dtype
    assert all(map(torch.equal, upstream, upstream_before)), "the backward overwrote the upstream gradient"
    theirs = run(eager, inputs, upstream)
    truth = run(eager, wide(inputs), tuple(t.double() for t in upstream))
    assert ours.keys() == limits.keys(), f"{sorted(ours)} computed, limits for {sorted(limits)}"
    for name, limit in limits.items():
        coarsest = computed_in if name.startswith("d") else None
        assert_parity(name, ours[name], theirs[name], truth[name], limit, computed_in=coarsest)
    return ours, theirs, truth


def check_no_farther(ours: Tensors, theirs: Tensors, truth: Tensors) -> None:
    """Raise `OverLimit` where a tensor is more than twice as far from the truth as theirs, beyond the order of sums."""
    for name, expected in truth.items():
        limit = max(2 * float((theirs[name] - expected).norm() / expected.norm()), 2e-6)
        error = float((ours[name] - expected).norm() / expected.norm())
        if not error <= limit:
            raise OverLimit(f"{name}: {error:.2e} > {limit:.2e}")

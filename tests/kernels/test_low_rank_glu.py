"""Gated linear units over products that lack LoRA's term."""

import pytest
import torch

from fastllm.kernels.activation import ACTIVATIONS
from fastllm.kernels.lora import Projection, ProjectionGroup
from fastllm.kernels.low_rank_glu import (
    LowRankTerm,
    input_term,
    low_rank_glu_backward,
    low_rank_glu_forward,
    output_term,
)

from . import eager
from .parity import Limit, OverLimit, Setting, assert_parity, run

# Three passes of tf32, which a GPU makes of an fp32 product, leave 2^-21 of it.
LIMIT = Limit(1.1, 5e-7)


def term_of(setting: Setting, rows: int, width: int, rank: int, layout: str) -> LowRankTerm:
    """Columns of a wider buffer times the rows of an A, or the transpose of a B; parameters are finer than the rest."""
    left = setting.randn(rows, rank + 9)[:, 3 : 3 + rank]
    if layout == "input":
        return LowRankTerm(left, setting.randn(rank, width, scale=rank**-0.5, dtype=torch.float32), 0.7)
    return LowRankTerm(left, setting.randn(width, rank, scale=rank**-0.5, dtype=torch.float32).t())


def check_low_rank_glu(
    setting: Setting,
    rows: int,
    width: int,
    *,
    ranks: tuple[int | None, int | None, int | None] = (5, 16, 7),
    activation: str = "silu",
) -> None:
    """h and its gradients where the layer has them: over their inputs, inside a wider buffer."""
    wide = setting.randn(rows, 2 * width + 6)
    spare = wide[:, 2 * width :].clone()
    gate, up, dh = wide[:, :width], wide[:, width : 2 * width], setting.randn(rows, width)
    layouts = ("output", "output", "input")
    terms = [
        None if rank is None else term_of(setting, rows, width, rank, layout)
        for rank, layout in zip(ranks, layouts, strict=True)
    ]

    def complete(dtype: torch.dtype) -> list[torch.Tensor]:
        parts = []
        for value, term in zip((gate, up, dh), terms, strict=True):
            value = value.to(dtype)
            if term is not None:
                value = value + term.left.to(dtype) @ (term.right * term.scaling).to(setting.dtype).to(dtype)
            parts.append(value)
        return parts

    def glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return eager.glu(gate, up, activation)

    def expected(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        gate, up, dh = complete(dtype)
        return run(glu, {"gate": gate, "up": up}, (dh,))

    theirs, truth = expected(setting.dtype), expected(torch.float64)
    gate_term, up_term, dh_term = terms
    with setting.active():
        h = low_rank_glu_forward(gate, up, activation, gate_term, up_term, out=torch.empty_like(dh))
        low_rank_glu_backward(dh, gate, up, activation, dh_term, gate_term, up_term, gate, up, h_out=dh)
    assert wide[:, 2 * width :].equal(spare), "wrote past the columns of up"
    if not dh.equal(h):
        raise OverLimit("the backward's h differs from the forward's")
    for name, value in {"y": h, "dgate": gate, "dup": up}.items():
        assert_parity(name, value, theirs[name], truth[name], LIMIT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 61), (67, 130), (130, 16)], ids=str)
def test_matches_float64(setting, shape, activation):
    check_low_rank_glu(setting, *shape, activation=activation)


@pytest.mark.parametrize(
    "ranks", [(1, 64, 33), (None, 8, 8), (8, None, 8), (8, 8, None), (None, None, 8), (None, None, None)], ids=str
)
def test_ranks(setting, ranks):
    check_low_rank_glu(setting, 33, 100, ranks=ranks)


def test_no_rows(setting):
    check = setting.randn(0, 32)
    term = term_of(setting, 0, 32, 4, "output")
    with setting.active():
        assert low_rank_glu_forward(check, check, "silu", term, term, out=check.clone()).shape == (0, 32)
        low_rank_glu_backward(check, check, check, "silu", term, term, term, check, check, h_out=check)


def test_unknown_activation(fp32):
    x = fp32.randn(2, 4)
    with fp32.active(), pytest.raises(ValueError, match="relu"):
        low_rank_glu_forward(x, x, "relu", None, None, out=x.clone())


def check_terms(setting: Setting) -> None:
    """Those of a group: of each projection, of both halves of one (Phi-3), of one without an adapter."""
    a = [setting.randn(rank, 48) for rank in (3, 4)]
    b = [setting.randn(32, rank) for rank in (3, 4)]
    weight = setting.randn(32, 48)
    two = ProjectionGroup([Projection(weight, None, *ab, scaling=2.0) for ab in zip(a, b, strict=True)], is_fp8=True)
    low_rank, dy_low_rank = setting.randn(5, 64), setting.randn(5, 64)
    one = ProjectionGroup([Projection(torch.cat([weight, weight]), None, a[0], torch.cat([b[0], 2 * b[0]]), 2.0)])
    half = ProjectionGroup([Projection(weight), two.projections[1]])
    first, second = slice(0, 32), slice(32, 64)
    found = [
        output_term(two, low_rank, first), output_term(two, low_rank, second), output_term(one, low_rank, second),
        output_term(half, low_rank, second), input_term(one, dy_low_rank),
    ]  # fmt: skip
    expected = [
        low_rank[:, :3] @ b[0].t(), low_rank[:, 3:7] @ b[1].t(), low_rank[:, :3] @ (2 * b[0]).t(),
        low_rank[:, :4] @ b[1].t(), dy_low_rank[:, :3] @ (2.0 * a[0]),
    ]  # fmt: skip
    for term, value in zip(found, expected, strict=True):
        if term is None or not torch.allclose(term.value(torch.float32), value.float(), rtol=1e-2, atol=1e-2):
            raise OverLimit("another term")
    assert output_term(half, low_rank, first) is None


def test_terms_of_a_group(fp32):
    check_terms(fp32)

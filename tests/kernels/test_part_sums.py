"""Sums of parts, each into a matrix of its own."""

import pytest
import torch

from fastllm.kernels.part_sums import PartSum, add_up

from .parity import OverLimit, Setting


def check_sums(setting: Setting, parts: int, rows: int, ranks: tuple[int, ...] = (5, 16, 7)) -> None:
    """Into columns of a wider matrix, one stored by columns, and a contiguous one; each number once rounded."""
    given = setting.randn(parts, rows, sum(ranks) + 2, dtype=torch.float32)
    wide = torch.full((rows, 40), 7.0, dtype=setting.dtype, device=setting.device)
    outs = [wide[:, 3 : 3 + ranks[0]]]
    outs += [torch.empty(rank, rows, device=setting.device).t() for rank in ranks[1:2]]
    outs += [torch.empty(rows, rank, device=setting.device) for rank in ranks[2:]]
    factors, firsts = (1.0, 0.25, 3.0), [1, 1 + ranks[0], 1 + sum(ranks[:2])]
    with setting.active():
        add_up(given, [PartSum(*part) for part in zip(outs, firsts, factors, strict=False)])
    for out, first, rank, factor in zip(outs, firsts, ranks, factors, strict=False):
        expected = given.double().sum(0)[:, first : first + rank] * factor
        step = torch.finfo(out.dtype).eps
        bound = step * expected.abs() + parts * 1e-7 * factor * given.abs().sum(0)[:, first : first + rank]
        if not ((out.double() - expected).abs() <= bound).all():
            raise OverLimit(f"off by {(out.double() - expected).abs().max()}")
    if not (wide[:, :3].eq(7.0).all() and wide[:, 3 + ranks[0] :].eq(7.0).all()):
        raise OverLimit("wrote past the columns")


@pytest.mark.parametrize("parts", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 16, 67])
def test_matches_float64(setting, parts, rows):
    check_sums(setting, parts, rows)


@pytest.mark.parametrize("ranks", [(1,), (16, 3)], ids=str)
def test_fewer_sums(setting, ranks):
    check_sums(setting, 5, 33, ranks)


def test_nothing_to_add(fp32):
    with fp32.active():
        add_up(torch.empty(2, 0, 4, device=fp32.device), [PartSum(torch.empty(0, 4, device=fp32.device), 0)])
        add_up(torch.empty(2, 3, 0, device=fp32.device), [])

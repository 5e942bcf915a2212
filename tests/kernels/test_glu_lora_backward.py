"""The backward of a gated linear unit together with LoRA's narrow products of what it makes."""

import pytest
import torch

from fastllm.kernels import glu_lora_backward as module
from fastllm.kernels.activation import ACTIVATIONS
from fastllm.kernels.glu_lora_backward import MAX_RANK, Narrow, glu_lora_backward, serves_groups
from fastllm.kernels.lora import Projection, ProjectionGroup

from . import eager
from .conftest import see_capability
from .parity import Limit, OverLimit, Setting, assert_parity, run

# Three passes of tf32, which a GPU makes of an fp32 product, leave 2^-21 of it.
LIMIT = Limit(1.1, 5e-7)
# Of sums of rounded terms that are rounded themselves: the root of two, and more where they are few.
PRODUCT = Limit(2.5, 2e-6, eager=1.1, rel_max=2.0)
NAMES = ("dgate", "dup", "h")


def check_products(
    setting: Setting,
    rows: int,
    width: int,
    *,
    ranks: tuple[int | None, int | None, int | None] = (5, 16, 7),
    with_right: tuple[bool, bool, bool] = (True, True, True),
    activation: str = "silu",
) -> None:
    """The gradients over gate and up inside a wider buffer, and every product, X R in columns of another."""
    wide = setting.randn(rows, 2 * width + 6)
    spare = wide[:, 2 * width :].clone()
    gate, up, dh = wide[:, :width], wide[:, width : 2 * width], setting.randn(rows, width)
    outs = torch.full((3, rows, MAX_RANK + 9), 7.0, dtype=setting.dtype, device=setting.device)
    narrow: list[Narrow | None] = []
    for rank, has_right, out in zip(ranks, with_right, outs, strict=True):
        if rank is None:
            narrow.append(None)
            continue
        left = setting.randn(rows, rank + 9)[:, 3 : 3 + rank]
        right = None
        if has_right and len(narrow) < 2:  # a B, finer than the rest
            right = setting.randn(width, rank, dtype=torch.float32)
        elif has_right:  # an A
            right = setting.randn(rank, width).t()
        factor = 0.5 if len(narrow) == 2 else 1.0  # the scaling of an A
        narrow.append(Narrow(left, right, out[:, :rank] if has_right else None, factor))

    def expected(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        inputs = {"gate": gate.to(dtype), "up": up.to(dtype)}
        found = run(lambda gate, up: eager.glu(gate, up, activation), inputs, (dh.to(dtype),))
        found["h"] = found.pop("y")
        for name, part in zip(NAMES, narrow, strict=True):
            if part is not None:
                found[f"{name} left"] = found[name].t() @ part.left.to(dtype) * part.factor
                if part.right is not None and part.out is not None:
                    found[f"{name} right"] = found[name] @ part.right.to(dtype)
        return found

    theirs, truth = expected(setting.dtype), expected(torch.float64)
    with setting.active():
        found = glu_lora_backward(dh, gate, up, activation, gate, up, narrow=narrow)
    assert wide[:, 2 * width :].equal(spare), "wrote past the columns of up"
    for name, value in {"dgate": gate, "dup": up}.items():
        assert_parity(name, value, theirs[name], truth[name], LIMIT)
    for name, part, left, out in zip(NAMES, narrow, found, outs, strict=True):
        assert (part is None) == (left is None)
        if part is None or left is None:
            continue
        key = f"{name} left"
        assert_parity(key, left, theirs[key], truth[key], PRODUCT, computed_in=setting.dtype)
        rank = 0 if part.out is None else part.left.shape[1]
        if rank:
            key = f"{name} right"
            assert_parity(key, out[:, :rank], theirs[key], truth[key], PRODUCT)
        if not (out[:, rank:] == 7.0).all():
            raise OverLimit("wrote past the ranks")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 61), (67, 130), (130, 16)], ids=str)
def test_matches_float64(setting, shape, activation):
    check_products(setting, *shape, activation=activation)


@pytest.mark.parametrize(
    "ranks", [(1, 16, 11), (None, 8, 8), (8, None, 8), (8, 8, None), (None, None, 8), (None, None, None)], ids=str
)
def test_ranks(setting, ranks):
    check_products(setting, 33, 100, ranks=ranks)


@pytest.mark.parametrize("with_right", [(True, True, False), (False, True, False), (False, False, False)], ids=str)
def test_without_the_sums_along_columns(setting, with_right):
    check_products(setting, 33, 150, with_right=with_right)


def check_many_programs(setting: Setting, programs: int = 2) -> None:
    """Rows in several launches and shares, columns in several strips; programs that pass from one to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SCRATCH_BYTES", 43008)
        patch.setattr(module, "_tiling", lambda x, **_: module._TILINGS[2])
        patch.setattr(module, "_programs", lambda *_: programs)
        check_products(setting, 150, 300)


@pytest.mark.parametrize("programs", [1, 2, 7])
def test_many_programs(setting, programs):
    check_many_programs(setting, programs)


def test_no_rows(setting):
    empty = setting.randn(0, 32)
    narrow = [Narrow(setting.randn(0, 4), setting.randn(32, 4), setting.randn(0, 4)), None, Narrow(setting.randn(0, 3))]
    with setting.active():
        first, second, third = glu_lora_backward(empty, empty, empty, "silu", empty, empty, narrow=narrow)
    assert second is None and not first.any() and not third.any()
    assert first.shape == (32, 4) and third.shape == (32, 3)


def test_same_bits_on_every_run(setting):
    def once() -> list[torch.Tensor]:
        again = Setting(setting.implementation, setting.dtype, setting.device)
        gate, up, dh, out = (again.randn(70, 200) for _ in range(4))
        narrow = [Narrow(again.randn(70, 4), again.randn(200, 4), out[:, :4]), None, None]
        with again.active():
            found = glu_lora_backward(dh, gate, up, "silu", gate, up, narrow=narrow)
        return [gate, up, out, found[0]]

    assert all(map(torch.equal, once(), once()))


def test_unknown_activation(fp32):
    x = fp32.randn(2, 4)
    with fp32.active(), pytest.raises(ValueError, match="relu"):
        glu_lora_backward(x, x, x, "relu", x, x, narrow=[None, None, None])


def groups(rank: int, *, dropout: float = 0.0) -> tuple[ProjectionGroup, ProjectionGroup]:
    def new(rows: int, columns: int) -> Projection:
        ab = (torch.zeros(rank, columns), torch.zeros(rows, rank)) if rank else (None, None)
        return Projection(torch.zeros(rows, columns), None, *ab, dropout=dropout)

    return ProjectionGroup([new(32, 16), new(32, 16)]), ProjectionGroup([new(16, 32)])


def test_which_groups_it_serves(monkeypatch, device):
    x = torch.zeros(3, 32, device=device)
    setting = Setting("triton", torch.float32, device)
    with setting.active():
        assert serves_groups(*groups(1), x) and serves_groups(*groups(MAX_RANK), x)
        gate_up, down = groups(4)
        merged = ProjectionGroup([Projection(torch.zeros(64, 16), None, torch.zeros(4, 16), torch.zeros(64, 4))])
        assert serves_groups(gate_up, ProjectionGroup([Projection(torch.zeros(16, 32))]), x)
        assert not serves_groups(merged, down, x)
        assert not serves_groups(*groups(0), x)
        assert not serves_groups(*groups(MAX_RANK + 1), x)
        assert not serves_groups(*groups(4, dropout=0.1), x)
        if x.is_cuda:
            see_capability(monkeypatch, 7, 5)
            assert not serves_groups(gate_up, down, x)
    with Setting("reference", torch.float32, device).active():
        assert not serves_groups(gate_up, down, x)

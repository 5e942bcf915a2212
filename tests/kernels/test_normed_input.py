"""Gradients of projections behind an RMSNorm: with the norm's output only where that is needed, and in its range."""

import pytest
import torch

from fastllm.kernels import normed_input
from fastllm.kernels.layer_definition import Norm
from fastllm.kernels.lora import Projection, ProjectionGroup, prepare, project_reference
from fastllm.kernels.normed_input import normed_parameter_grads
from fastllm.kernels.rms_norm import rms_norm_forward, rms_norm_reference

from .parity import Limit, Setting, assert_parity

ROWS, WIDTH, RANK = 67, 96, 5
# dY B rounds, and then rstd dY B or the norm's output.
DA = Limit(2.0, 2.5e-6, eager=1.1, rel_max=2.0)


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of norm outputs that were computed again."""
    seen = []

    def watched(*args, out: torch.Tensor, **kwargs):
        seen.append(out.dtype)
        return rms_norm_forward(*args, out=out, **kwargs)

    monkeypatch.setattr(normed_input, "rms_norm_forward", watched)
    return seen


def tensors_of(setting: Setting, *, size: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "x": setting.randn(ROWS, WIDTH, scale=size),
        "norm": setting.randn(WIDTH),
        **{f"weight{i}": setting.randn(n, WIDTH, scale=WIDTH**-0.5) for i, n in enumerate((40, 24))},
        **{f"a{i}": setting.randn(RANK, WIDTH, scale=WIDTH**-0.5) for i in range(2)},
        **{f"b{i}": setting.randn(n, RANK) for i, n in enumerate((40, 24))},
        "dy": setting.randn(ROWS, 64),
    }


def grads(tensors: dict[str, torch.Tensor], offset: float, needs: tuple[bool, ...], dropout: float = 0.0):
    """One entry for each weight, bias, A and B of two projections."""
    group = ProjectionGroup(
        [Projection(tensors[f"weight{i}"], None, tensors[f"a{i}"], tensors[f"b{i}"], 2.0, dropout) for i in range(2)]
    )
    x, dy = tensors["x"], tensors["dy"]
    prepared = prepare(group, dy.dtype, rows=ROWS)
    normed, _, rstd = rms_norm_forward(x, tensors["norm"], 1e-5, offset=offset)
    masks = [torch.ones(ROWS, WIDTH, dtype=torch.bool, device=x.device) if dropout else None] * 2
    return normed_parameter_grads(
        prepared, Norm(tensors["norm"], 1e-5, offset), x, rstd, dy, dy @ prepared.b, normed @ prepared.a.t(), masks,
        needs * 2,
    )  # fmt: skip


def expected(tensors: dict[str, torch.Tensor], offset: float) -> list[torch.Tensor]:
    """dA of both projections, by autograd."""
    normed = rms_norm_reference(tensors["x"], tensors["norm"], 1e-5, offset=offset)
    found = []
    for i, rows in enumerate((slice(0, 40), slice(40, 64))):
        a = tensors[f"a{i}"].clone().requires_grad_()
        projection = Projection(tensors[f"weight{i}"], None, a, tensors[f"b{i}"], 2.0)
        project_reference(normed, projection).backward(tensors["dy"][:, rows])
        found.append(a.grad)
    return found


def check_da(setting: Setting, norms: list[torch.dtype], *, offset: float = 0.0, size: float = 1.0) -> None:
    tensors = tensors_of(setting, size=size)
    with setting.active():
        _, _, da0, _, _, _, da1, _ = grads(tensors, offset, (False, False, True, True))
    theirs, truth = expected(tensors, offset), expected({n: t.double() for n, t in tensors.items()}, offset)
    for i, da in enumerate((da0, da1)):
        assert_parity(f"da{i}", da, theirs[i], truth[i], DA)
    assert len(norms) == (setting.dtype == torch.float16), "fp16 has not the range that rstd dY B may need"


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_is_not_computed_again(setting, norms, offset):
    check_da(setting, norms, offset=offset)


@pytest.mark.parametrize("size", [1e-3, 3e3])
def test_residual_streams_of_any_size(setting, norms, size):
    check_da(setting, norms, size=size)


def test_the_norm_is_computed_again_for_weights_and_dropout(fp32, norms):
    tensors = tensors_of(fp32)
    with fp32.active():
        dw, _, da, _, *_ = grads(tensors, 0.0, (True, False, True, False))
        assert len(norms) == 1
        kept, _, _, db, *_ = grads(tensors, 0.0, (False, False, False, True))
        assert len(norms) == 1 and kept is None and db is not None
        grads(tensors, 0.0, (False, False, True, False), dropout=0.5)
        assert len(norms) == 2
    normed = rms_norm_reference(tensors["x"], tensors["norm"], 1e-5)
    torch.testing.assert_close(dw, tensors["dy"][:, :40].t() @ normed)
    torch.testing.assert_close(da, expected(tensors, 0.0)[0], rtol=1e-4, atol=1e-4)

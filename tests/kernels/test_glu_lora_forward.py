"""A gated linear unit that makes the next projection's x A^T as well: h, the product, and zeros beside it."""

import pytest
import torch

from fastllm.kernels.activation import ACTIVATIONS
from fastllm.kernels.glu import glu_forward, glu_reference
from fastllm.kernels.glu_lora_forward import glu_lora_forward, serves_rank

from .conftest import see_capability
from .parity import Limit, OverLimit, Setting, assert_parity

# Triton's interpreter computes masked lanes too, in numpy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# h rounds, and then its product.
H_A = Limit(1.5, 2.5e-6, eager=1.1, rel_max=2.0)


def check_forward(
    setting: Setting, rows: int, width: int, *, rank: int = 5, extension: int = 8, activation: str = "silu"
) -> None:
    """gate and up side by side in one buffer, h beside its product in another; the bits of h are `glu_forward`'s."""
    joined = setting.randn(rows, 2 * width + 3)
    gate, up = joined[:, :width], joined[:, width : 2 * width]
    a = setting.randn(extension, width, scale=width**-0.5)
    buffer = torch.full((rows, width + extension), float("nan"), dtype=setting.dtype, device=setting.device)
    before = joined.clone()
    with setting.active():
        glu_lora_forward(gate, up, activation, a, rank, out=buffer[:, :width], low_rank=buffer[:, width:])
        alone = glu_forward(gate, up, activation)
    assert joined.equal(before)
    h, low_rank = buffer[:, :width], buffer[:, width:]
    if not h.equal(alone):
        raise OverLimit("h differs from that of glu_forward")
    if low_rank[:, rank:].count_nonzero():  # NaN counts
        raise OverLimit("values past the rank")
    eager = glu_reference(gate, up, activation) @ a[:rank].t()
    truth = glu_reference(gate.double(), up.double(), activation) @ a[:rank].double().t()
    assert_parity("h A^T", low_rank[:, :rank], eager, truth, H_A)


@pytest.mark.parametrize("shape", [(1, 1), (5, 61), (33, 150), (67, 300)], ids=str)
def test_matches_float64(setting, shape):
    check_forward(setting, *shape)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(setting, activation):
    check_forward(setting, 19, 70, activation=activation)


@pytest.mark.parametrize(("rank", "extension"), [(1, 8), (8, 8), (16, 64), (19, 64), (32, 64)])
def test_ranks(setting, rank, extension):
    check_forward(setting, 17, 70, rank=rank, extension=extension)


def test_no_rows(fp32):
    check_forward(fp32, 0, 32)


def test_unknown_activation(fp32):
    x = fp32.randn(2, 4)
    with fp32.active(), pytest.raises(ValueError, match="relu"):
        glu_lora_forward(x, x, "relu", x, 1, out=x, low_rank=x)


def test_which_ranks_it_serves(monkeypatch, device):
    x = torch.zeros(3, 32, device=device)
    with Setting("triton", torch.float32, device).active():
        assert serves_rank(1, x) and serves_rank(32, x)
        assert not serves_rank(0, x) and not serves_rank(33, x)
        if x.is_cuda:
            see_capability(monkeypatch, 7, 5)
            assert not serves_rank(16, x)
    with Setting("reference", torch.float32, device).active():
        assert not serves_rank(16, x)

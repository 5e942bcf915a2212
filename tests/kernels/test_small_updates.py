"""LoRA's term after the first steps is a thousandth of what it is added to. Its mean survives the rounding to 16 bits
where both are added before; where each is rounded for itself, most of it is lost, and training starts slowly."""

import pytest
import torch

from fastllm.kernels import lora
from fastllm.kernels.lora import Projection, ProjectionGroup, project_group

from .parity import Setting
from .quantized import dequantized, quantize

IN_FEATURES, OUT_FEATURES, RANK, UPDATE = 512, 384, 8, 2e-4


def share_of(term: torch.Tensor, whole: torch.Tensor, rest: torch.Tensor) -> float:
    """How much of a term is in `whole`, which is `rest` without it: 1 for all of it."""
    return float(((whole.double() - rest) * term).sum() / term.square().sum())


def shares(setting: Setting, rows: int, weights: str) -> dict[str, float]:
    """Of the low-rank term in y and in the gradient of x, through a group; and in y by two roundings."""
    weight = setting.randn(OUT_FEATURES, IN_FEATURES, scale=IN_FEATURES**-0.5)
    exact, given = weight, weight
    if weights == "nf4":
        given, packed, state = quantize(weight.float())
        exact = dequantized(packed, state, setting.dtype)
    a = setting.randn(RANK, IN_FEATURES, scale=IN_FEATURES**-0.5, dtype=torch.float32).requires_grad_()
    b = (UPDATE * setting.randn(OUT_FEATURES, RANK, dtype=torch.float32).sign()).requires_grad_()
    x = setting.randn(rows, IN_FEATURES).requires_grad_()
    dy = setting.randn(rows, OUT_FEATURES)
    with setting.active():
        y = project_group(x, ProjectionGroup([Projection(given, None, a, b, 1.0)]))
        y.backward(dy)
    x64, dy64, a64, b64, exact64 = (t.detach().double() for t in (x, dy, a, b, exact))
    assert x.grad is not None
    plain, term = x64 @ exact64.t(), x64 @ a64.t() @ b64.t()
    rounded = plain.to(setting.dtype) + term.to(setting.dtype)
    return {
        "y": share_of(term, y.detach(), plain),
        "dx": share_of(dy64 @ b64 @ a64, x.grad, dy64 @ exact64),
        "two roundings": share_of(term, rounded, plain),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["dense", "nf4"])
@pytest.mark.parametrize("rows", [100, 1000])
@pytest.mark.parametrize("adds_in_16_bits", [False, True])
def test_they_are_not_lost(device, monkeypatch, rows, weights, dtype, adds_in_16_bits):
    """On GPUs dense weights are joined with A and B for many rows, and terms are added in fp32 for few."""
    if device.type == "cpu":
        monkeypatch.setattr(lora, "_adds_in_16_bits", lambda *_: adds_in_16_bits)
    found = shares(Setting("triton" if device.type == "cuda" else "reference", dtype, device), rows, weights)
    if dtype == torch.bfloat16:
        assert found["two roundings"] < 0.5
    for name in ("y", "dx"):
        assert found[name] == pytest.approx(1, abs=0.2), found

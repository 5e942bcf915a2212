"""Vision-language models of small batches run tower and decoder as recordings: the same training."""

import pytest
import torch

from fastllm.models.model_methods import PLANNER
from fastllm.models.patch import unwrapped
from fastllm.models.recordings import Recordings
from tests.kernels.repetition import repeat

from .test_parity import batch_of
from .test_tower import load


def train(checkpoint, device, *, is_on, setting):
    """Losses and last gradients of a few steps on images of one size, and (parts, layers) that are recorded."""
    model, processor = load(checkpoint, checkpointing=setting)
    recordings = Recordings(None if device.type == "cuda" else lambda device: repeat)
    recordings.is_on = is_on
    getattr(unwrapped(model), PLANNER).recordings = recordings
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    losses, grads = [], {}
    for seed in range(5):
        inputs = {name: value.to(device) for name, value in batch_of(model, processor).items()}
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(inputs["pixel_values"].shape, generator=generator).to(device)
        loss = model(**{**inputs, "pixel_values": noise}).loss
        loss.backward()
        losses.append(loss.detach())
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = [(key[0], len(shape.passes)) for key, shape in recordings._shapes.items() if shape.passes]
    return torch.stack(losses), grads, found


@pytest.mark.parametrize("setting", [False, True, "fastllm"])
def test_training_is_the_same(checkpoint, device, setting):
    losses, grads, found = train(checkpoint, device, is_on=True, setting=setting)
    expected_losses, expected_grads, without = train(checkpoint, device, is_on=False, setting=setting)
    assert [part for part, _ in found] == ["tower", "decoder"] and without == []
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    for name, expected in expected_grads.items():
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

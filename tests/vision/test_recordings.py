"""Vision-language models of small batches run tower and decoder as recordings: the same training."""

import pytest
import torch

from fastllm.models.model_methods import PLANNER
from fastllm.models.patch import unwrapped
from fastllm.models.recordings import Recordings
from fastllm.trainer import UnslothVisionDataCollator
from tests.kernels.repetition import repeat

from .conftest import row
from .test_tower import load


def two_rows(size):
    return [row(size, width=32 + 8 * size), row(size + 1, answer="the fox " * (1 + size), width=48)]


def one_row(size):
    return [row(size, width=16 + 8 * size, height=16)]


def train(checkpoint, device, *, is_on, setting=False, sizes=(0,) * 5, rows_of=None):
    """Losses and last gradients of a few steps, one for each choice of images, and (parts, layers) recorded."""
    rows_of = rows_of or two_rows
    # In fp32 a GPU has no attention kernel that can be called by itself.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, processor = load(checkpoint, checkpointing=setting, dtype=dtype)
    recordings = Recordings(None if device.type == "cuda" else lambda device: repeat)
    recordings.is_on = is_on
    getattr(unwrapped(model), PLANNER).recordings = recordings
    model.train()
    collate = UnslothVisionDataCollator(model, processor, resize="max", train_on_responses_only=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    losses, grads = [], {}
    for seed, size in enumerate(sizes):
        inputs = {name: value.to(device) for name, value in collate(rows_of(size)).items()}
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


def assert_alike(losses, expected_losses, grads, expected_grads):
    is_exact = losses.device.type == "cpu"
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5 if is_exact else 2e-3, atol=0)
    difference = sum(float((grads[name] - grad).square().sum()) for name, grad in expected_grads.items())
    total = sum(float(grad.square().sum()) for grad in expected_grads.values())
    assert grads.keys() == expected_grads.keys()
    assert difference <= (1e-4 if is_exact else 3e-2) ** 2 * total


@pytest.mark.parametrize("setting", [False, True, "fastllm"])
def test_training_is_the_same(checkpoint, device, setting):
    losses, grads, found = train(checkpoint, device, is_on=True, setting=setting)
    expected_losses, expected_grads, without = train(checkpoint, device, is_on=False, setting=setting)
    assert [part for part, _ in found] == ["tower", "decoder"] and without == []
    assert_alike(losses, expected_losses, grads, expected_grads)


def test_images_of_many_sizes_share_recordings(checkpoint, device):
    """Rows of the tower and lengths of the decoder are rounded up; what is added changes nothing."""
    sizes = [0, 1, 2, 3, 4, 5, 6, 0]
    losses, grads, found = train(checkpoint, device, is_on=True, sizes=sizes)
    expected_losses, expected_grads, _ = train(checkpoint, device, is_on=False, sizes=sizes)
    assert [part for part, _ in found] == ["tower", "decoder"], "one shape each"
    assert_alike(losses, expected_losses, grads, expected_grads)


def test_blocks_that_saw_the_same_may_see_different_things_later(checkpoint, device):
    """A small image is a single window: blocks with windows and blocks without see the same, and run in one call. That
    is noticed to be over when the image is larger, in the block for which it is."""
    sizes = [0, 0, 0, 0, 2, 1, 0, 0]
    losses, grads, found = train(checkpoint, device, is_on=True, sizes=sizes, rows_of=one_row)
    expected_losses, expected_grads, _ = train(checkpoint, device, is_on=False, sizes=sizes, rows_of=one_row)
    assert "decoder" in dict(found)
    assert_alike(losses, expected_losses, grads, expected_grads)

"""Positions, windows and angles of images are worked out on the host, and are those of transformers."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm.models import blocks
from fastllm.models.image_layout import ImageLayouts, read_together
from fastllm.models.patch import unwrapped
from fastllm.trainer import UnslothVisionDataCollator

from .conftest import row
from .test_tower import load

SIZES = [(32, 24), (48, 40), (16, 8)]


@pytest.fixture
def make_batch(checkpoint, device):
    """(model, collated rows with an image each, padded on the right or on the left)"""

    def make(*, sizes=SIZES, side="right"):
        model, processor = load(checkpoint)
        processor.tokenizer.padding_side = side
        collate = UnslothVisionDataCollator(model, processor, resize="max", train_on_responses_only=True)
        rows = [
            row(seed, width=width, height=height, answer="the fox " * (1 + seed))
            for seed, (width, height) in enumerate(sizes)
        ]
        return model.train(), {name: value.to(device) for name, value in collate(rows).items()}

    return make


def step(model, inputs):
    """Loss, and gradients of the adapters."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def decoder_inputs(model, inputs):
    """What the decoder is given besides."""
    found = {}
    text = unwrapped(model).model.language_model
    hook = text.register_forward_pre_hook(lambda _, args, kwargs: found.update(kwargs), with_kwargs=True)
    model(**inputs)
    hook.remove()
    return found


@pytest.mark.parametrize("side", ["right", "left"])
def test_steps_are_the_same_bit_by_bit(make_batch, monkeypatch, device, side):
    model, inputs = make_batch(side=side)
    ours = [step(model, copy.copy(inputs)) for _ in range(2)]
    monkeypatch.setattr(blocks, "needed_on_host", lambda model, inputs: {})
    theirs = step(model, copy.copy(inputs))
    for found in ours:
        assert found.keys() == theirs.keys() and len(theirs) > 10
        if device.type == "cpu":
            assert all(torch.equal(found[name], expected) for name, expected in theirs.items())
        torch.testing.assert_close(found, theirs)


def test_positions_are_those_of_transformers(make_batch, monkeypatch):
    """Also where the batch is made longer, and where other images have as many tokens."""
    model, inputs = make_batch()
    _, turned = make_batch(sizes=[(24, 32), (40, 48), (8, 16)])
    ours = [decoder_inputs(model, batch)["position_ids"] for batch in (inputs, turned, inputs)]
    monkeypatch.setattr(blocks, "needed_on_host", lambda model, inputs: {})
    theirs = [decoder_inputs(model, batch)["position_ids"] for batch in (inputs, turned, inputs)]
    assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))
    assert not torch.equal(theirs[0], theirs[1]), "the two batches differ"


class HostValues(TorchDispatchMode):
    """Counts the times that the host asks for a value of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_asks_for_hardly_anything(make_batch):
    """transformers asks a few times for each image."""
    model, inputs = make_batch()
    model(**inputs)
    with HostValues() as values:
        model(**inputs)
    assert values.count <= 8, "of copies in host memory: padding, patches, tokens, labels"


def test_images_without_their_tokens_are_an_error(make_batch):
    model, inputs = make_batch()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(
        inputs["input_ids"] == unwrapped(model).config.image_token_id, 9
    )
    with pytest.raises(ValueError, match="do not match"):
        model(**inputs)


def test_generation_after_training(make_batch):
    """The offset of the positions, which transformers remembers of a prompt, is that of the prompt at hand."""
    model, inputs = make_batch()
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    model.eval()
    before = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    step(model.train(), make_batch(sizes=SIZES[:1])[1])
    model.zero_grad()
    assert torch.equal(model.eval().generate(**prompt, max_new_tokens=4, do_sample=False), before)


def test_tensors_are_read_in_one_transfer(device):
    given = {"mask": torch.tensor([True, False]), "grid": torch.tensor([[1, 2, 3]]), "flag": torch.tensor(True)}
    found = read_together({name: tensor.to(device) for name, tensor in given.items()})
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "mask": [1, 0], "grid": [[1, 2, 3]], "flag": 1
    }  # fmt: skip
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    assert read_together({}) == {}


def test_only_the_latest_layouts_are_remembered():
    layouts, made = ImageLayouts(most=2), []
    for key in ("a", "b", "a", "c", "a", "b"):
        assert layouts.find(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b", "c", "b"]

"""One training step and a greedy answer of each family, beside plain transformers + PEFT on the same weights."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from fastllm import FastVisionModel
from fastllm.trainer import UnslothVisionDataCollator
from tests.models.families import Step, float64_twin, on_device_of, step

from .conftest import picture, row

FP32_ULP = 2.0**-23
# fp32 gradients differ by the order of sums alone; this much error either side may have.
BACKSTOP = 1e-6


def with_weights(model, weights):
    """The LoRA weights of one PEFT model given to another."""
    model.load_state_dict({name: value for name, value in weights.items() if "lora_" in name}, strict=False)
    return model


@pytest.fixture
def pair(checkpoint):
    """(fastllm's model, transformers + PEFT on the same weights, processor), adapters away from zero."""
    model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, dtype=torch.float32)
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=6, use_gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint).to(model.device)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=model.peft_config["default"].target_modules)
    plain = with_weights(get_peft_model(plain, config), model.state_dict())
    return model, plain, processor


def batch_of(model, processor, *, seed=0, **settings):
    two = row(seed + 3, answer="fox")
    two["messages"][0]["content"].append({"type": "image", "image": picture(seed + 4, 16, 40)})
    rows = [row(seed), row(seed + 1, answer="the quick brown fox jumps over", width=48), two, {"messages": [
        {"role": "user", "content": "why"}, {"role": "assistant", "content": "the dog"}]}]  # fmt: skip
    collate = UnslothVisionDataCollator(model, processor, resize="max", train_on_responses_only=True, **settings)
    return on_device_of(model, collate(rows))


def part_of(found, part):
    """The gradients of one part of the model, as a step of their own."""
    return Step(found.loss, {name: grad for name, grad in found.grads.items() if f".{part}." in name})


@pytest.mark.parametrize("checkpointing", [False, "unsloth"])
def test_a_step_is_no_farther_from_float64_than_transformers(pair, checkpointing):
    """Loss, and the gradients of vision and language adapters taken apart."""
    model, plain, processor = pair
    model = FastVisionModel.for_training(model, use_gradient_checkpointing=checkpointing)
    report = model.fast_report()
    assert len(report.layers) == len(report.vision) == 2
    assert all(layer.path == "fused" for part in (report.layers, report.vision) for layer in part)
    plain.train()
    batch = batch_of(model, processor)
    exact_batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    exact = step(copy.deepcopy(plain).double(), exact_batch)
    ours, theirs = step(model, batch), step(plain, batch)
    assert ours.grads.keys() == theirs.grads.keys() == exact.grads.keys()
    for part in ("visual", "language_model"):
        truth = part_of(exact, part)
        assert len(truth.grads) >= 16 and all(grad.abs().max() > 0 for grad in truth.grads.values())
        our_error, their_error = part_of(ours, part).distance(truth), part_of(theirs, part).distance(truth)
        assert our_error["whole"] <= max(1.25 * their_error["whole"], BACKSTOP), part
        assert our_error["worst"] <= max(2 * their_error["worst"], BACKSTOP), part
        assert our_error["loss"] <= max(1.1 * their_error["loss"], FP32_ULP)


def root_mean_square(values):
    return math.sqrt(sum(value**2 for value in values) / len(values))


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_bf16_step_is_no_farther_from_float64_than_transformers(checkpoint, load_in_4bit):
    """Adapters on the tower, which stays in 16 bits, and on a decoder of 4 or 16; under autocast, as trainers step."""
    found = []
    for patch in (True, False):
        model, processor = FastVisionModel.from_pretrained(
            checkpoint, load_in_4bit=load_in_4bit, dtype=torch.bfloat16, patch=patch
        )
        model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=6, use_gradient_checkpointing=False)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        found.append(model)
    model, plain = found
    report = model.fast_report()
    assert len(report.vision) == 2 and all(layer.path == "fused" for layer in report.layers + report.vision)
    twin = float64_twin(plain, AutoModelForImageTextToText)
    errors = {"visual": ([], []), "language_model": ([], [])}
    for seed in range(4):
        batch = batch_of(model, processor, seed=seed)
        exact = step(twin, {n: v.double() if v.is_floating_point() else v for n, v in batch.items()})
        steps = [step(each, batch, autocast=torch.bfloat16) for each in (model, plain)]
        assert steps[0].grads.keys() == steps[1].grads.keys() == exact.grads.keys()
        for part, sides in errors.items():
            for side, each in zip(sides, steps, strict=True):
                side.append(part_of(each, part).distance(part_of(exact, part)))
    for part, (ours, theirs) in errors.items():
        for name, factor in {"whole": 1.1, "median": 1.1, "worst": 2.0}.items():
            error, limit = (root_mean_square([distance[name] for distance in side]) for side in (ours, theirs))
            assert error <= factor * limit, (part, name)


def test_greedy_answers_are_those_of_transformers(pair):
    model, plain, processor = pair
    FastVisionModel.for_inference(model)
    plain.eval()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in it"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    for inputs in (
        processor(picture(7), text, add_special_tokens=False, return_tensors="pt"),
        processor([picture(8), picture(9, 48, 16)], [text, "fox " + text], padding=True, return_tensors="pt"),
    ):
        inputs = on_device_of(model, inputs)
        ours, theirs = (m.generate(**inputs, max_new_tokens=16, do_sample=False) for m in (model, plain))
        assert torch.equal(ours, theirs) and ours.shape[1] > inputs["input_ids"].shape[1]


def test_the_loss_divides_by_the_tokens_of_the_optimiser_batch(pair):
    model, plain, processor = pair
    batch = batch_of(model, processor)
    count = int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        mean, shared = plain(**batch).loss, model(**batch, num_items_in_batch=torch.tensor(2 * count)).loss
    torch.testing.assert_close(shared, mean / 2)


def test_loss_of_a_batch_is_that_of_its_rows(pair):
    """Padding and neighbours change nothing: summed token losses of a batch are those of its rows alone."""
    model, _, processor = pair
    collate = UnslothVisionDataCollator(model, processor, resize="max")
    rows = [row(0), row(1, answer="the quick brown fox jumps over", width=48)]

    def total(batch):
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            return float(model(**on_device_of(model, batch)).loss) * count

    assert total(collate(rows)) == pytest.approx(sum(total(collate([one])) for one in rows), rel=1e-5)


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", ["unsloth", "offload", True, False])
def test_16_bit_steps_are_finite_and_close(checkpoint, dtype, load_in_4bit, checkpointing):
    """Every way of holding the base, every checkpointing: the loss of fp32, and a gradient for each adapter."""
    exact, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, dtype=torch.float32)
    model, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=load_in_4bit, dtype=dtype)
    model = FastVisionModel.get_peft_model(model, r=4, use_gradient_checkpointing=checkpointing)
    batch = batch_of(model, processor)
    assert batch["pixel_values"].dtype == dtype
    found = step(model, batch)
    with torch.no_grad():
        expected = exact(**{**batch, "pixel_values": batch["pixel_values"].float()}).loss
    assert found.loss == pytest.approx(float(expected), rel=2e-2 if load_in_4bit else 3e-3)
    assert len(found.grads) >= 44 and all(grad.isfinite().all() for grad in found.grads.values())
    assert all(grad.abs().max() > 0 for name, grad in found.grads.items() if "lora_B" in name)

"""Fifty optimiser steps on images beside transformers + PEFT, inside twice the noise band of transformers itself.

As tests/models/test_trajectories.py, whose band it is: the same model, data and seeds, changed only in ways that are
mathematically nothing. fastllm's run is judged padded and padding-free.
"""

import copy
import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from fastllm import FastVisionModel
from fastllm.trainer import UnslothVisionDataCollator
from tests.models.families import on_device_of
from tests.models.test_trajectories import STEPS, deviations

from .conftest import picture, row

WORDS = ["the lazy dog", "fox", "the quick brown fox jumps over", "dog and fox"]


def rows_of(seed, index):
    """Four rows: images of several sizes, one row with two of them, one without."""
    first = 100 * seed + 4 * (index % 8)
    rows = [row(first + n, answer=WORDS[(first + n) % 4], width=16 * (1 + n), height=24) for n in range(4)]
    rows[1]["messages"][0]["content"].append({"type": "image", "image": picture(first, 16, 40)})
    rows[3]["messages"][0]["content"].pop()
    return rows


def trained(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def train(model, collate, seed, *, reverse=False, micro_batches=1):
    """Losses and gradient norms, with the loss over all tokens of the optimiser batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    losses, norms = [], []
    model.train()
    for index in range(STEPS):
        rows = rows_of(seed, index)[:: -1 if reverse else 1]
        size = len(rows) // micro_batches
        parts = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
        count, total = sum(map(trained, parts)), 0.0
        for part in parts:
            loss = model(**on_device_of(model, part)).loss * (trained(part) / count)
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_inside_twice_the_null_band(checkpoint, padding_free, device):
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint).to(device)

    def ours(setting):
        model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, dtype=torch.float32)
        model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=6, use_gradient_checkpointing=setting)
        return same_start(model), processor

    def same_start(model):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model

    def theirs(implementation="sdpa"):
        model = copy.deepcopy(plain)
        model.set_attn_implementation(implementation)
        return same_start(get_peft_model(model, copy.deepcopy(config)))

    model, processor = ours(False)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=model.peft_config["default"].target_modules)
    padded, ratios = UnslothVisionDataCollator(model, processor, resize="max"), []
    for seed, setting in enumerate((False, "unsloth", False)):
        model, _ = ours(setting)
        collate = UnslothVisionDataCollator(model, processor, resize="max", padding_free=padding_free)
        reference = train(theirs(), padded, seed)
        null = [
            train(theirs(), padded, seed, reverse=True),
            train(theirs(), padded, seed, micro_batches=2),
            train(theirs(), padded, seed, micro_batches=4, reverse=True),
            train(theirs("eager"), padded, seed),
        ]
        assert reference[0][-10:].mean() < reference[0][:10].mean(), "the reference run must learn something"
        band = [max(values) for values in zip(*(deviations(each, reference) for each in null), strict=True)]
        band[2] = max(band[2], band[0] / STEPS)
        found = deviations(train(model, collate, seed), reference)
        ratios.append([value / most for value, most in zip(found, band, strict=True)])
    loss, norm, drift = (statistics.median(values) for values in zip(*ratios, strict=True))
    assert loss <= 2 and norm <= 2 and drift <= 3, ratios

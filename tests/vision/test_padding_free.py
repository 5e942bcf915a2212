"""Rows with images laid end to end train as they do in a padded batch, each seeing itself alone."""

import pickle

import pytest
import torch
from transformers import AutoModelForImageTextToText

from fastllm import FastVisionModel
from fastllm._errors import UnsupportedError
from fastllm.models import blocks
from fastllm.trainer import UnslothVisionDataCollator
from tests.models.families import fast_copy, on_device_of, step, with_lora

from .conftest import picture, row
from .families import FAMILIES, batch
from .test_families import TARGETS, build


@pytest.fixture
def loaded(checkpoint):
    """(model with adapters away from zero, processor)"""
    model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, dtype=torch.float32)
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=6, use_gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, processor


@pytest.fixture
def cases(monkeypatch):
    """The attention cases of every decoder layer that ran."""
    seen = []
    original = blocks.attention_case

    def recording(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(blocks, "attention_case", recording)
    return seen


def rows_of_all_kinds():
    """One image, a wide one, two with text between, none."""
    two = row(3, answer="fox")
    two["messages"][0]["content"].append({"type": "image", "image": picture(4, 16, 40)})
    text = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "the dog"}]}
    return [row(0), row(1, answer="the quick brown fox jumps over", width=48), two, text]


def collate(loaded, rows, **settings):
    return UnslothVisionDataCollator(*loaded, resize="max", **settings)(rows)


def test_a_batch_is_its_rows_one_after_the_other(loaded):
    rows = rows_of_all_kinds()
    flat, padded = collate(loaded, rows, padding_free=True), collate(loaded, rows)
    assert set(flat) == {*padded, "position_ids"} - {"attention_mask"}
    alone = [collate(loaded, [one]) for one in rows]
    lengths = [one["input_ids"].shape[1] for one in alone]
    assert len(set(lengths)) == 4
    for name in ("input_ids", "mm_token_type_ids"):
        assert torch.equal(flat[name], torch.cat([one[name] for one in alone], dim=1))
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(flat[name], padded[name])
    for one, labels in zip(alone, flat["labels"].split(lengths, dim=1), strict=True):
        assert labels[0, 0] == -100 and torch.equal(labels[:, 1:], one["labels"][:, 1:])
    assert (flat["labels"] != -100).sum() == (padded["labels"][:, 1:] != -100).sum()


def test_positions_are_those_of_each_row_alone(loaded):
    rows = rows_of_all_kinds()
    model = loaded[0].get_base_model().model
    batch = collate(loaded, rows, padding_free=True)
    expected = []
    for one in (collate(loaded, [each]) for each in rows):
        text = torch.arange(one["input_ids"].shape[1])[None, None]
        spatial = text.expand(3, 1, -1)
        if "image_grid_thw" in one:
            names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
            spatial, _ = model.get_rope_index(**{name: one[name] for name in names})
        expected.append(torch.cat([text, spatial]))
    assert torch.equal(batch["position_ids"], torch.cat(expected, dim=-1))
    text_only = collate(loaded, rows[3:] * 2, padding_free=True)
    assert text_only["position_ids"].tolist() == [[[*range(text_only["input_ids"].shape[1] // 2)] * 2]] * 4


@pytest.mark.parametrize("checkpointing", [False, "unsloth"])
def test_a_step_is_that_of_the_padded_batch(loaded, cases, checkpointing):
    """Loss and every gradient, of tower and decoder, with no mask of all pairs."""
    model = FastVisionModel.for_training(loaded[0], use_gradient_checkpointing=checkpointing)
    rows = rows_of_all_kinds()
    expected = step(model, collate(loaded, rows, train_on_responses_only=True))
    cases.clear()
    batch = collate(loaded, rows, train_on_responses_only=True, padding_free=True)
    got = step(model, batch)
    distance = got.distance(expected)
    assert distance["loss"] <= 1e-6 and distance["whole"] <= 6e-6 and distance["worst"] <= 2e-5, distance
    assert len(cases) == 2 and all(case.mask is None for case in cases)
    starts = (batch["position_ids"][0, 0] == 0).nonzero().flatten().tolist()
    assert cases[0].documents.cu_seqlens.tolist() == [*starts, batch["input_ids"].shape[1]]


def test_a_row_does_not_see_the_one_before(loaded):
    """Another first row of the same length: not a bit of the second one's hidden states changes."""
    model = loaded[0].get_base_model().train()
    found = []
    for seed in (0, 5):
        batch = collate(loaded, [row(seed), row(1, answer="fox")], padding_free=True)
        second = int((batch["position_ids"][0, 0] == 0).nonzero()[1])
        found.append(model(**on_device_of(model, batch), output_hidden_states=True).hidden_states[-1])
    assert found[0][:, second:].equal(found[1][:, second:])
    assert not found[0][:, :second].equal(found[1][:, :second])


def test_evaluation_keeps_rows_apart(loaded):
    model = FastVisionModel.for_inference(loaded[0])
    rows = rows_of_all_kinds()
    with torch.no_grad():
        batches = (on_device_of(model, collate(loaded, rows, padding_free=free)) for free in (True, False))
        got, expected = (model(**each).loss for each in batches)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_transformers_reads_the_batch_alike(loaded, checkpoint):
    """The batch is in transformers' own form: its model gives the same loss, through its own mask."""
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint)
    rows = rows_of_all_kinds()
    with torch.no_grad():
        got = plain(**collate(loaded, rows, padding_free=True), use_cache=False).loss
        expected = plain(**collate(loaded, rows)).loss
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_padding_to_a_multiple_is_a_row_of_its_own(loaded):
    rows = rows_of_all_kinds()[:2]
    batch, exact = (collate(loaded, rows, padding_free=True, pad_to_multiple_of=n) for n in (32, None))
    length = exact["input_ids"].shape[1]
    assert length % 32 != 0 and batch["input_ids"].shape[1] % 32 == 0
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name][..., :length], exact[name])
    assert (batch["labels"][:, length:] == -100).all() and (batch["position_ids"][..., length] == 0).all()
    with torch.no_grad():
        losses = [float(loaded[0](**on_device_of(loaded[0], each)).loss) for each in (batch, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_long_rows_are_cut_and_left_out_as_in_a_padded_batch(loaded, messages):
    late = row(question="the quick brown fox " * 50)
    rows = [late, row(answer="the quick brown fox " * 50), row(1)]
    batch = collate(loaded, rows, padding_free=True, max_seq_length=64)
    assert "left out" in (told := messages()) and "text at its end is cut" in told
    lengths = (batch["position_ids"][0, 0] == 0).nonzero().flatten().diff().tolist()
    assert lengths == [64] and batch["image_grid_thw"].shape == (2, 3)


def test_the_collator_takes_no_weights_to_the_data_loader(loaded):
    collator = UnslothVisionDataCollator(*loaded, padding_free=True)
    assert len(pickle.dumps(collator._row_positions)) < 50_000


def end_to_end(model, padded):
    """The rows of a padded batch in one."""
    shown, shape = padded["attention_mask"] != 0, padded["input_ids"].shape
    flat = {n: v[shown][None] for n, v in padded.items() if v.shape[:2] == shape and n != "attention_mask"}
    flat["labels"] = padded["labels"].index_fill(1, shown.new_zeros(1, dtype=torch.long), -100)[shown][None]
    rest = {n: v for n, v in padded.items() if v.shape[:2] != shape}
    return {**rest, **flat, "position_ids": model.row_positions(padded)[..., shown].unsqueeze(-2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_rows_apart(family, cases, device):
    """In every family that can. Gemma 3's images see themselves, and Llama 3.2's text its images, through masks."""
    model = with_lora(fast_copy(build(FAMILIES[family], device)), target_modules=TARGETS)
    assert (model.row_positions is None) == (family in ("gemma3", "mllama"))
    if model.row_positions is None:
        return
    padded = batch(FAMILIES[family], device=device)
    expected = step(model, padded)
    cases.clear()
    flat = end_to_end(model, padded)
    distance = step(model, flat).distance(expected)
    assert distance["loss"] <= 1e-6 and distance["whole"] <= 6e-6 and distance["worst"] <= 2e-5, distance
    assert len(cases) == 3 and all(case.mask is None for case in cases)
    assert cases[0].documents.cu_seqlens.tolist() == [0, 45, 86, 131]


def test_models_that_would_mix_the_rows_are_refused(checkpoint):
    model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, patch=False)
    with pytest.raises(UnsupportedError, match="nothing keeps the rows"):
        UnslothVisionDataCollator(model, processor, padding_free=True)

"""Rows as data sets hold them: where media stand, what templates take, and photographs as people see them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor

from fastllm import FastVisionModel
from fastllm._errors import DataError, TokenizerError, UnsupportedError
from fastllm.images import open_image
from fastllm.trainer import UnslothVisionDataCollator

from .conftest import TEMPLATE, picture, row
from .test_collator import text_of, trained_text


@pytest.fixture
def loaded(checkpoints):
    return FastVisionModel.from_pretrained(checkpoints["qwen2_5_vl"], load_in_4bit=False)


@pytest.fixture
def collate(loaded):
    def make(*rows, **settings):
        return UnslothVisionDataCollator(*loaded, **{"resize": "max", **settings})(rows)

    return make


def conversation(*texts, **columns):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)], **columns}


def test_images_stand_where_the_text_says(collate):
    """As LLaVA's data sets write it."""
    two = [picture(1), picture(2, 16, 16)]
    marked = conversation("first <image> or <image>\nwhy", "fox", images=two)
    parted = conversation("", "fox", images=two)
    parted["messages"][0]["content"] = [
        {"type": "text", "text": "first "}, {"type": "image"}, {"type": "text", "text": " or "}, {"type": "image"},
        {"type": "text", "text": "\nwhy"},
    ]  # fmt: skip
    expected, batch = collate(parted), collate(marked)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    turns = conversation("<image> why", "fox", "<image>", "dog", images=two)
    assert (collate(turns)["image_grid_thw"][:, 1:].prod(-1) // 4).tolist() == [12, 4]
    with pytest.raises(DataError, match="say <image> 1 times, and its column has 2"):
        collate(conversation("<image> why", "fox", images=two))


def test_a_long_conversation_with_images_in_several_turns(collate, loaded):
    turns = row(1)["messages"] + row(2, answer="fox", width=16)["messages"] + conversation("why", "dog")["messages"]
    batch = collate({"messages": turns}, train_on_responses_only=True)
    assert batch["image_grid_thw"].shape == (2, 3)
    assert trained_text(batch, loaded) == "the lazy dog<|im_end|>fox<|im_end|>dog<|im_end|>"


def test_messages_may_say_that_they_are_not_trained(collate, loaded):
    two = {"messages": [*row()["messages"], *conversation("why", "fox")["messages"]]}
    two["messages"][1]["weight"] = 0
    assert trained_text(collate(two, train_on_responses_only=True), loaded) == "fox<|im_end|>"


def test_padding_to_a_multiple_leaves_the_answers(collate, loaded):
    for _ in range(2):
        batch = collate(row(0), row(1, answer="fox"), pad_to_multiple_of=32, train_on_responses_only=True)
        assert [trained_text(batch, loaded, i) for i in (0, 1)] == ["the lazy dog<|im_end|>", "fox<|im_end|>"]


def test_template_variables_of_a_row(collate, loaded):
    tools = [{"type": "function", "function": {"name": "jump", "parameters": {}}}]
    loaded[1].chat_template = "{{ tools[0]['function']['name'] if tools }}{{ mood }}" + TEMPLATE
    given = {**row(), "tools": tools, "chat_template_kwargs": {"mood": "lazy"}}
    for settings in ({}, {"train_on_responses_only": True}):
        batch = collate(given, row(), **settings)
        texts = [text_of(batch, loaded, i).partition("<|im_start|>")[0] for i in (0, 1)]
        assert texts == ["jumplazy", ""]


STRING_ANSWERS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'user' %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %}{{ ' ' + m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("join", ["{{ ' ' + m['content'] }}", "{{ m['content'] }}"], ids=["raises", "prints a list"])
def test_templates_that_take_the_answer_as_text_only(collate, loaded, join):
    """As Mistral's do: the answer's text parts become its text."""
    loaded[1].chat_template = STRING_ANSWERS.replace("{{ ' ' + m['content'] }}", join)
    system = {"messages": [{"role": "system", "content": [{"type": "text", "text": "brown"}]}, *row()["messages"]]}
    batch = collate(system, train_on_responses_only=True)
    assert trained_text(batch, loaded).strip() == "the lazy dog<|im_end|>"
    assert "brown" in (text := text_of(batch, loaded)) and "type" not in text


def test_a_processor_without_a_template(collate, loaded):
    loaded[1].chat_template = loaded[1].tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match=r"row 0 of the batch.*no chat template"):
        collate(row())


BROKEN = {
    "both be text or both be messages": {"prompt": row()["messages"][:1], "completion": "fox"},
    "not a dict or a list of messages": 3,
    "not a picture": {"messages": conversation("why", "fox")["messages"], "images": [[picture()]]},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_row_is_named(collate, reason):
    with pytest.raises(DataError, match=rf"row 1 of the batch.*{reason}"):
        collate(row(), BROKEN[reason])


def test_pixels_that_make_no_batch_are_refused(collate, monkeypatch):
    """A list in their place would be left out, and the model would train without its images."""
    call = Qwen2VLProcessor.__mro__[1].__call__

    def ragged(self, **given):
        batch = call(self, **given)
        return {**batch, "pixel_values": list(batch["pixel_values"])}

    monkeypatch.setattr(Qwen2VLProcessor.__mro__[1], "__call__", ragged)
    with pytest.raises(UnsupportedError, match="gives pixel_values as lists"):
        collate(row())


def test_photographs_are_turned_upright():
    image = picture(0, 30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert open_image(buffer.getvalue()).tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_depths_other_than_8_bits():
    gray = Image.fromarray(np.array([[0, 257 * 40, 65535]], dtype=np.uint16))
    buffer = io.BytesIO()
    gray.save(buffer, "PNG")
    for source in (gray, buffer.getvalue()):
        assert np.asarray(open_image(source))[0, :, 0].tolist() == [0, 40, 255]
    assert np.asarray(open_image(Image.fromarray(np.full((2, 2), 7, dtype=np.int32))))[0, 0].tolist() == [7, 7, 7]
    for values in (np.full((2, 2), 0.5, dtype=np.float32), np.full((2, 2), 70_000, dtype=np.int32)):
        with pytest.raises(DataError, match="8 bits"):
            open_image(Image.fromarray(values))

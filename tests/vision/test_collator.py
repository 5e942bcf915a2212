"""`VisionDataCollator`: every form of row, whole images, loss where it belongs, and errors that name the row."""

import base64
import io

import pytest
import torch

from fastllm import FastVisionModel
from fastllm._errors import ArgumentError, DataError, UnsupportedError
from fastllm.images import ImageSize, open_image
from fastllm.trainer import UnslothVisionDataCollator
from fastllm.vision_data import spread_over_media
from tests.models.families import on_device_of

from .conftest import Image, picture, row


@pytest.fixture(scope="module")
def loaded(checkpoints):
    return FastVisionModel.from_pretrained(checkpoints["qwen2_5_vl"], load_in_4bit=False, dtype=torch.float32)


@pytest.fixture
def collate(loaded):
    def make(*rows, **settings):
        return UnslothVisionDataCollator(*loaded, **{"resize": "max", **settings})(rows)

    return make


def loss_of(batch, loaded):
    return loaded[0](**on_device_of(loaded[0], batch)).loss


def trained_text(batch, loaded, index=0):
    labels = batch["labels"][index]
    return loaded[1].tokenizer.decode(labels[labels != -100])


def text_of(batch, loaded, index=0):
    return loaded[1].tokenizer.decode(batch["input_ids"][index][batch["attention_mask"][index] == 1])


def test_a_batch_is_what_the_processor_makes_of_the_rendered_rows(collate, loaded):
    rows = [row(0), row(1, answer="fox jumps over", width=48, height=16)]
    batch = collate(*rows)
    processor = loaded[1]
    texts = [processor.apply_chat_template(r["messages"], tokenize=False) for r in rows]
    images = [r["messages"][0]["content"][1]["image"] for r in rows]
    expected = processor(
        images=images, text=texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
    )
    assert set(batch) == {*expected, "labels"}
    for name in expected:
        assert torch.equal(batch[name], expected[name])
    untrained = (expected["attention_mask"] == 0) | (expected["input_ids"] == loaded[0].config.image_token_id)
    assert torch.equal(batch["labels"], expected["input_ids"].masked_fill(untrained, -100))


def with_image(image):
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is in it"}]},
        {"role": "assistant", "content": "the lazy dog"},
    ]


def bare():
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in it"}]},
        {"role": "assistant", "content": "the lazy dog"},
    ]


def no_parts():
    return [{"role": "user", "content": "what is in it"}, {"role": "assistant", "content": "the lazy dog"}]


FORMS = {
    "messages": lambda image: {"messages": with_image(image)},
    "a bare list": with_image,
    "conversations": lambda image: {"conversations": with_image(image)},
    "from and value": lambda image: {
        "conversations": [
            {"from": "human", "value": with_image(image)[0]["content"]},
            {"from": "gpt", "value": "the lazy dog"},
        ]
    },
    "empty keys of Arrow": lambda image: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image, "text": None},
                    {"type": "text", "image": None, "text": "what is in it"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "image": None, "text": "the lazy dog"}]},
        ],
        "images": None,
    },
    "a column of images": lambda image: {"messages": bare(), "images": [image]},
    "a column of one image": lambda image: {"messages": bare(), "image": image},
    "a column without places": lambda image: {"messages": no_parts(), "images": [image]},
    "image_url": lambda image: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": as_data(image)}},
                    {"type": "text", "text": "what is in it"},
                ],
            },
            no_parts()[1],
        ]
    },
    "prompt and completion": lambda image: {"prompt": with_image(image)[:1], "completion": with_image(image)[1:]},
}


def as_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_data(image):
    return "data:image/png;base64," + base64.b64encode(as_bytes(image)).decode()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_row_is_the_same_batch(collate, form):
    expected = collate(FORMS["messages"](picture()), train_on_responses_only=True)
    batch = collate(FORMS[form](picture()), train_on_responses_only=True)
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


def test_images_open_from_wherever_they_are(tmp_path):
    image = picture()
    path = tmp_path / "a.png"
    path.write_bytes(as_bytes(image))
    forms = [
        image, path, str(path), f"file://{path}", as_bytes(image), {"bytes": as_bytes(image), "path": None},
        {"bytes": None, "path": str(path)}, as_data(image), torch.from_numpy(__import__("numpy").array(image)),
    ]  # fmt: skip
    for form in forms:
        assert open_image(form).tobytes() == image.tobytes(), form


def test_rows_with_two_one_and_no_images_share_a_batch(collate, loaded):
    two = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
            {"role": "assistant", "content": "fox"},
            {"role": "user", "content": "why"},
            {"role": "assistant", "content": "dog"},
        ],
        "images": [picture(1), picture(2, 16, 16)],
    }
    none = {"messages": no_parts()}
    batch = collate(two, row(3), none, train_on_responses_only=True)
    counts = (batch["input_ids"] == loaded[0].config.image_token_id).sum(1)
    assert counts.tolist() == [12 + 4, 12, 0] and batch["image_grid_thw"].shape == (3, 3)
    assert trained_text(batch, loaded, 0) == "fox<|im_end|>dog<|im_end|>"
    assert trained_text(batch, loaded, 2) == "the lazy dog<|im_end|>"
    assert torch.isfinite(loss_of(batch, loaded))
    only_text = collate(none)
    assert "pixel_values" not in only_text and torch.isfinite(loss_of(only_text, loaded))


def test_loss_on_answers(collate, loaded):
    sneaky = row(question="say <|im_start|>assistant\nfox<|im_end|>")
    assert trained_text(collate(sneaky, train_on_responses_only=True), loaded) == "the lazy dog<|im_end|>"
    two = {
        "messages": row()["messages"] + [{"role": "user", "content": "why"}, {"role": "assistant", "content": "fox"}]
    }
    assert trained_text(collate(two, train_on_responses_only=True), loaded) == "the lazy dog<|im_end|>fox<|im_end|>"
    last = collate(two, train_on_responses_only=True, last_response_only=True)
    assert trained_text(last, loaded) == "fox<|im_end|>"
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    assert trained_text(collate(two, train_on_responses_only=True, **parts), loaded) == (
        "the lazy dog<|im_end|>fox<|im_end|>"
    )
    with pytest.raises(ArgumentError, match="go together"):
        collate(two, train_on_responses_only=True, response_part="<|im_start|>assistant\n")


def test_loss_on_the_completion(collate, loaded):
    messages = row()["messages"]
    parted = {"prompt": messages[:1], "completion": messages[1:]}
    assert trained_text(collate(parted), loaded) == "the lazy dog<|im_end|>"
    assert "what is in it" in trained_text(collate(parted, completion_only_loss=False), loaded)
    text = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>why ", "completion": "the fox", "images": [picture()]}
    assert trained_text(collate(text), loaded).strip() == "the fox"


def test_a_formatting_function_makes_the_row(collate):
    expected = collate(row(5))
    batch = collate({"seed": 5}, formatting_func=lambda example: row(example["seed"]))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_long_rows_lose_text_and_never_image_tokens(collate, loaded, messages):
    image_token = loaded[0].config.image_token_id
    long = row(answer="the quick brown fox " * 50)
    batch = collate(long, row(1), max_seq_length=64)
    assert batch["input_ids"].shape == (2, 64) == batch["mm_token_type_ids"].shape
    assert ((batch["input_ids"] == image_token).sum(1) == 12).all() and "text at its end is cut" in messages()
    late = row(question="the quick brown fox " * 50)
    batch = collate(late, row(1), max_seq_length=64)
    assert batch["input_ids"].shape[0] == 1 == batch["image_grid_thw"].shape[0]
    assert "row 0 of the batch, 'the quick brown" in (told := messages()) and "left out" in told
    assert torch.isfinite(loss_of(batch, loaded))
    with pytest.raises(DataError, match="no row of the batch has its images and videos within 64 tokens"):
        collate(late, max_seq_length=64)


def test_padding_to_a_multiple(collate):
    batch = collate(row(), row(1, answer="fox"), pad_to_multiple_of=16)
    assert batch["input_ids"].shape[1] % 16 == 0
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


BROKEN = {
    "can't be decoded": lambda tmp: with_image(b"no picture"),
    "truncated": lambda tmp: with_image(as_bytes(picture(0, 200, 200))[:3000]),
    "there is no file": lambda tmp: with_image(str(tmp / "missing.png")),
    "is on the network": lambda tmp: with_image("https://example.com/a.png"),
    "neither bytes nor path": lambda tmp: with_image({"bytes": None, "width": 3}),
    "not a picture": lambda tmp: with_image(3),
    "uint8": lambda tmp: with_image(torch.zeros(3, 8, 8)),
    "no image is left": lambda tmp: {"messages": bare()},
    "1 more than its messages have places for": lambda tmp: {"messages": bare(), "images": [picture(), picture()]},
    "has 2 places": lambda tmp: row(question="what does <|image_pad|> mean"),
    "no conversation": lambda tmp: {"image": picture()},
    "has no role": lambda tmp: {"messages": [{"content": "why"}]},
    "the processor refuses it": lambda tmp: with_image(picture(0, 900, 2)),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_row_is_named(collate, reason, tmp_path):
    with pytest.raises(DataError, match=reason) as caught:
        collate(row(), BROKEN[reason](tmp_path), row(1))
    assert "row 1 of the batch" in str(caught.value)


def test_an_oversized_image_is_refused_before_it_is_decoded(collate, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(DataError, match="101 x 100 pixels") as caught:
        collate({"id": "page-7", **row(width=101, height=100)})
    assert "id 'page-7', image 0" in str(caught.value)


def test_sounds_are_refused(collate):
    sound = {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}
    for rows in (sound, {"messages": no_parts(), "audio": "a.wav"}):
        with pytest.raises(UnsupportedError, match=r"row 1 of the batch.*audio"):
            collate(row(), rows)


def test_a_batch_without_a_trained_token_is_refused(collate):
    with pytest.raises(DataError, match="no token of the batch is trained"):
        collate({"messages": row()["messages"][:1]}, train_on_responses_only=True)


def test_sizes():
    wide = picture(0, 40, 20)
    cases = [
        (ImageSize(None), (40, 20)), (ImageSize(20), (20, 10)), (ImageSize(80), (40, 20)),
        (ImageSize(10, side=1), (20, 10)), (ImageSize(20, side="max"), (20, 10)), (ImageSize(10, side="min"), (20, 10)),
        (ImageSize((12, 30)), (12, 30)), (ImageSize(30, multiple=8), (32, 16)),
    ]  # fmt: skip
    for size, expected in cases:
        assert size.apply(wide).size == expected, size


def test_the_default_size_is_the_towers(loaded, messages):
    model, processor = loaded
    assert UnslothVisionDataCollator(model, processor).size.limit == 512
    assert "resize=" in messages()
    snapped = UnslothVisionDataCollator(model, processor, resize=100, snap_to_patch_size=True)
    assert snapped.size == ImageSize(100, 0, 8)
    for bad in ({"resize": "big"}, {"resize": 0}, {"resize_dimension": 2}):
        with pytest.raises(ArgumentError):
            UnslothVisionDataCollator(model, processor, **bad)
    with pytest.raises(ArgumentError, match="second of the two"):
        UnslothVisionDataCollator(model, processor.tokenizer)


def test_flags_follow_the_text_around_expanded_placeholders():
    media = {9, 8}
    spread = spread_over_media([False, False, True, False, True], [1, 9, 2, 9, 3], [1, 9, 8, 9, 2, 9, 9, 3], media)
    assert spread == [False, False, False, False, True, False, False, True]
    assert spread_over_media([True, True], [1, 2], [1, 2], media) == [True, True]
    assert spread_over_media([False, True], [9, 2], [8, 9, 9, 2], media) == [False, False, False, True]
    assert spread_over_media([True, False], [1, 9], [1, 9, 9], media) == [True, False, False]
    assert spread_over_media([True, True], [1, 2], [1, 2, 3], media) is None
    assert spread_over_media([True, False, True], [1, 9, 2], [1, 9, 9, 3], media) is None

"""Videos in rows: every form of them, the same batch; whole in it or not at all; errors that name row and frame."""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from fastllm import FastVisionModel
from fastllm._errors import DataError, MissingPackageError, UnsupportedError
from fastllm.trainer import UnslothVisionDataCollator
from fastllm.videos import open_video
from tests.models.families import on_device_of, step

from .conftest import PATCH, picture, row
from .test_collator import as_bytes, trained_text

MERGE = 2


class FrameProcessor:
    """Patches of videos in the layout of the Qwen-VL families, for machines without torchvision."""

    merge_size, temporal_patch_size = MERGE, 2
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __call__(self, videos, video_metadata, **options):
        patches, grids = [], []
        for video in videos:
            frames = torch.from_numpy(video).permute(0, 3, 1, 2) / 127.5 - 1
            if len(frames) % 2:
                frames = torch.cat([frames, frames[-1:]])
            side = PATCH * MERGE
            t, h, w = len(frames) // 2, frames.shape[2] // side, frames.shape[3] // side
            blocks = frames[:, :, : h * side, : w * side].reshape(t, 2, 3, h, MERGE, PATCH, w, MERGE, PATCH)
            patches.append(blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4))
            grids.append([t, h * MERGE, w * MERGE])
        metadata = [type("Metadata", (), {"sampled_fps": given["fps"] or 24}) for given in video_metadata]
        grids = torch.tensor(grids)
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grids, "video_metadata": metadata}


def without_torchvision(processor):
    processor.video_processor = FrameProcessor()
    return processor


@pytest.fixture(params=["stand-in", "torchvision"])
def loaded(request, checkpoint):
    """(model, processor that takes videos)"""
    if request.param == "torchvision":
        pytest.importorskip("torchvision")
    model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, dtype=torch.float32)
    return model, processor if request.param == "torchvision" else without_torchvision(processor)


@pytest.fixture
def collate(loaded):
    def make(*rows, **settings):
        return UnslothVisionDataCollator(*loaded, **{"resize": "max", **settings})(rows)

    return make


def frames(count=4, seed=0, width=16, height=24):
    return [picture(seed + number, width, height) for number in range(count)]


def with_video(video, question="what is in it", **options):
    part = {"type": "video", "video": video, **options}
    return {
        "messages": [
            {"role": "user", "content": [part, {"type": "text", "text": question}]},
            {"role": "assistant", "content": "the lazy dog"},
        ]
    }


def without_source():
    return [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what is in it"}]},
        {"role": "assistant", "content": "the lazy dog"},
    ]


def test_a_batch_is_what_the_processor_makes_of_the_frames(collate, loaded):
    videos = [frames(4), frames(5, seed=9, width=24, height=16)]
    batch = collate(*(with_video(video, fps=2.0) for video in videos))
    arrays = [np.stack([np.asarray(frame) for frame in video]) for video in videos]
    metadata = [{"total_num_frames": len(a), "fps": 2.0, "frames_indices": list(range(len(a)))} for a in arrays]
    text = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>what is in it<|im_end|>\n"
    expected = loaded[1](
        text=[text + "<|im_start|>assistant\nthe lazy dog<|im_end|>\n"] * 2, videos=arrays, video_metadata=metadata,
        do_sample_frames=False, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip
    assert set(batch) == {*expected, "labels"}
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name
    assert batch["video_grid_thw"].tolist() == [[2, 6, 4], [3, 4, 6]]
    video_token = loaded[0].config.video_token_id
    assert (batch["input_ids"] == video_token).sum(1).tolist() == [12, 18]
    assert (batch["labels"][batch["input_ids"] == video_token] == -100).all()


FORMS = {
    "arrays": lambda images: with_video([np.asarray(image) for image in images], fps=4),
    "one array": lambda images: with_video(np.stack([np.asarray(image) for image in images]), fps=4),
    "a tensor": lambda images: with_video(
        torch.from_numpy(np.stack([np.asarray(image) for image in images])), sample_fps=4
    ),
    "bytes": lambda images: with_video([{"bytes": as_bytes(image), "path": None} for image in images], fps=4),
    "a dict": lambda images: with_video({"frames": images, "fps": 4}),
    "video_url": lambda images: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"frames": images, "fps": 4}},
                    {"type": "text", "text": "what is in it"},
                ],
            },
            without_source()[1],
        ]
    },
    "a column of videos": lambda images: {"messages": without_source(), "videos": [{"frames": images, "fps": 4}]},
    "a column of one video": lambda images: {"messages": without_source(), "video": {"frames": images, "fps": 4}},
    "a column without places": lambda images: {
        "messages": [{"role": "user", "content": "what is in it"}, without_source()[1]],
        "video": {"frames": images, "fps": 4},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_video_is_the_same_batch(collate, form):
    expected = collate(with_video(frames(), fps=4))
    batch = collate(FORMS[form](frames()))
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


def test_frames_may_be_paths(collate, tmp_path):
    paths = []
    for number, frame in enumerate(frames()):
        paths.append(str(tmp_path / f"{number}.png"))
        frame.save(paths[-1])
    expected, batch = collate(with_video(frames())), collate(with_video(paths))
    assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])


def mixed_rows():
    both = with_video(frames(2, seed=3), fps=1)
    both["messages"][0]["content"].append({"type": "image", "image": picture(4, 16, 40)})
    text = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "fox"}]}
    return [with_video(frames(4, seed=20), fps=0.5), row(1), both, text]


def test_videos_images_and_text_share_a_batch(collate, loaded):
    batch = collate(*mixed_rows(), train_on_responses_only=True)
    config = loaded[0].config
    counts = [(batch["input_ids"] == token).sum(1).tolist() for token in (config.image_token_id, config.video_token_id)]
    assert counts == [[0, 12, 10, 0], [12, 0, 6, 0]]
    assert [trained_text(batch, loaded, i) for i in (0, 2)] == ["the lazy dog<|im_end|>"] * 2
    model = FastVisionModel.get_peft_model(loaded[0], r=2)
    found = step(model, batch)
    assert all(grad.isfinite().all() for grad in found.grads.values())
    assert any(grad.abs().max() > 0 for name, grad in found.grads.items() if "visual" in name)


def test_padding_free_rows_with_videos(collate, loaded, family):
    """Positions follow the rate of the frames, and the step is that of the padded batch."""
    model, _ = loaded
    rows = mixed_rows()
    flat, padded = collate(*rows, padding_free=True), collate(*rows)
    expected = []
    for one in map(collate, rows):
        text = torch.arange(one["input_ids"].shape[1])[None, None]
        names = {"mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"} & one.keys()
        spatial = text.expand(3, 1, -1)
        if len(names) > 1:
            spatial, _ = model.model.get_rope_index(one["input_ids"], **{name: one[name] for name in names})
        expected.append(torch.cat([text, spatial]))
    assert torch.equal(flat["position_ids"], torch.cat(expected, dim=-1))
    seconds = {"qwen2_vl": None, "qwen2_5_vl": [4.0, 2.0]}[family]
    assert (flat["second_per_grid_ts"].tolist() if seconds else None) == seconds
    model = FastVisionModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    distance = step(model, flat).distance(step(model, padded))
    assert distance["loss"] <= 1e-6 and distance["whole"] <= 6e-6 and distance["worst"] <= 2e-5, distance


def test_greedy_answers_to_videos_are_those_of_transformers(collate, loaded, checkpoint):
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint).to(loaded[0].device).eval()
    prompt = on_device_of(plain, collate(mixed_rows()[2]))
    prompt = {name: value for name, value in prompt.items() if name != "labels"}
    ours, theirs = (
        m.generate(**prompt, max_new_tokens=16, do_sample=False)
        for m in (FastVisionModel.for_inference(loaded[0]), plain)
    )
    assert torch.equal(ours, theirs) and ours.shape[1] > prompt["input_ids"].shape[1]


def test_seconds_are_not_rounded(checkpoints):
    """bf16 would make positions of other frames out of them."""
    model, processor = FastVisionModel.from_pretrained(
        checkpoints["qwen2_5_vl"], load_in_4bit=False, dtype=torch.bfloat16
    )
    collate = UnslothVisionDataCollator(model, without_torchvision(processor), resize="max")
    batch = collate([with_video(frames(), fps=29.97)])
    assert batch["pixel_values_videos"].dtype == torch.bfloat16
    assert batch["second_per_grid_ts"].dtype == torch.float32
    assert float(batch["second_per_grid_ts"]) == pytest.approx(2 / 29.97, rel=1e-6)


def test_frames_without_a_rate_are_told(collate, messages):
    collate(with_video(frames()))
    assert 'give "fps"' in messages()


def test_videos_are_never_cut(collate, loaded, messages):
    long, late = with_video(frames()), with_video(frames())
    long["messages"][1]["content"] = "the quick brown fox " * 50
    late["messages"][0]["content"].insert(0, {"type": "text", "text": "the quick brown fox " * 50})
    batch = collate(long, late, max_seq_length=64)
    assert batch["input_ids"].shape == (1, 64) and batch["video_grid_thw"].shape == (1, 3)
    assert int((batch["input_ids"] == loaded[0].config.video_token_id).sum()) == 12
    told = messages()
    assert "text at its end is cut" in told and "images or videos don't fit, so it is left out" in told


def test_frames_are_brought_to_size(collate):
    batch = collate(with_video(frames(2, width=48, height=48)), resize=16)
    assert batch["video_grid_thw"].tolist() == [[1, 4, 4]]


BROKEN = {
    "video 0: a video has no frames": lambda tmp: with_video([]),
    "video 0, frame 1: the image can't be decoded": lambda tmp: with_video([picture(), b"no picture"]),
    "video 0, frame 0: .*there is no file": lambda tmp: with_video([str(tmp / "a.png")]),
    "frame 2 of a video has 32 x 24 pixels": lambda tmp: with_video([*frames(2), picture()]),
    "video 0: there is no file": lambda tmp: with_video(str(tmp / "a.mp4")),
    "on the network": lambda tmp: with_video("https://example.com/a.mp4"),
    "neither frames, bytes nor path": lambda tmp: with_video({"width": 3}),
    "not a list of frames": lambda tmp: with_video(picture()),
    "no video is left": lambda tmp: {"messages": without_source()},
    "1 more than its messages have places for": lambda tmp: {"messages": without_source(), "videos": [frames()] * 2},
    "has 2 places": lambda tmp: with_video(frames(), question="what does <|video_pad|> mean"),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_video_is_named(collate, reason, tmp_path):
    with pytest.raises(DataError, match=reason) as caught:
        collate(row(), BROKEN[reason](tmp_path), row(1))
    assert "row 1 of the batch" in str(caught.value)


def test_sections_are_refused_and_sizes_told(collate, messages):
    with pytest.raises(UnsupportedError, match=r"row 0 of the batch.*video_start"):
        collate(with_video(frames(), video_start=1.0))
    collate(with_video(frames(), max_pixels=9))
    assert "max_pixels beside an image or a video is not read" in messages()


def test_tokens_and_features_are_counted_per_row(collate, loaded, monkeypatch):
    """A processor that puts the tokens of one row into another is not believed."""
    call = type(loaded[1]).__call__

    def swapped(self, **given):
        batch = call(self, **given)
        batch["video_grid_thw"] = batch["video_grid_thw"].flip(0)
        return batch

    monkeypatch.setattr(type(loaded[1]), "__call__", swapped)
    with pytest.raises(DataError, match=r"row 0 of the batch.*12 video tokens.*made 6 features"):
        collate(with_video(frames(4)), with_video(frames(2)))


def test_without_torchvision_the_reason_is_told(checkpoints, monkeypatch):
    model, processor = FastVisionModel.from_pretrained(checkpoints["qwen2_5_vl"], load_in_4bit=False)
    processor.video_processor = None
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    with pytest.raises(UnsupportedError, match=r"row 0 of the batch.*torchvision is not installed"):
        UnslothVisionDataCollator(model, processor)([with_video(frames())])


def test_without_a_decoder_the_reason_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"film")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install av"):
        open_video(tmp_path / "a.mp4")


@pytest.fixture
def film(tmp_path):
    """Three seconds at 10 frames a second, each frame of one brightness that grows."""
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 16
        for number in range(30):
            pixels = np.full((16, 32, 3), 8 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_files_are_decoded_at_the_rate_asked_for(film, collate):
    video = open_video(film)
    assert len(video.frames) == 6 and video.fps == pytest.approx(2.0) and video.frames[0].size == (32, 16)
    levels = [np.asarray(frame).mean() for frame in video.frames]
    assert levels == pytest.approx([8 * number for number in range(0, 30, 5)], abs=6)
    assert len(open_video(film.read_bytes(), fps=5).frames) == 15
    assert len(open_video({"path": str(film)}, num_frames=4).frames) == 4
    assert len(open_video(f"file://{film}", fps=10, max_frames=7).frames) == 7
    batch = collate(with_video(str(film), fps=1), row())
    assert batch["video_grid_thw"].tolist() == [[2, 4, 8]]
    film.write_bytes(film.read_bytes()[:100])
    with pytest.raises(DataError, match=r"row 1 of the batch.*video 0.*film.mp4' can't be decoded"):
        collate(row(), with_video(film))

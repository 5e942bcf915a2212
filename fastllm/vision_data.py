"""Batches of conversations with images and videos, for any trainer: `VisionDataCollator`.

Each row goes through the chat template, its media through the processor, and a batch comes out padded on the right, or
with its rows end to end. Media tokens are never cut: a row that is too long loses text after its last image or video,
or is left out, and it is said.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ._errors import ArgumentError, DataError, FastllmError, UnsupportedError
from ._notices import notice, warn
from .images import ImageSize, open_image
from .text.encoding import IGNORED, RowEncoder, is_trained, token_range, tools_of
from .text.formats import conversation_column, messages_of, without_nulls
from .text.rendering import Message, tokenizer_of
from .text.responses import train_on_responses_only as responses_of
from .text.sandbox import TemplateError
from .videos import Video, open_video
from .vision_rows import Media, column_media, describe, placed_media

if TYPE_CHECKING:
    from PIL.Image import Image

# Floating-point values that no rounding may change: positions are counted from them.
_EXACT = {"second_per_grid_ts"}
Row = Any
Span = tuple[int, int]


@dataclass
class Example:
    """A row ready for the processor. `spans` are the characters of `text` that are trained; None for all."""

    text: str
    images: list[Image] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    spans: list[tuple[int, int]] | None = None
    name: str = ""


class VisionDataCollator:
    """Turns rows with messages, images and videos into a batch for training.

    Rows are `{"messages": [...]}`, `{"conversations": [...]}`, `{"prompt": ..., "completion": ...}`, `{"text": ...}` or
    a list of messages, with `tools` and `chat_template_kwargs` for the chat template. Images stand in the messages,
    `{"type": "image", "image": ...}`, or in a column `images` (or `image`), in the order of the messages' image parts;
    without such parts they go where the text says `<image>`, or before the first question. Each is anything that
    `fastllm.images.open_image` opens. Videos likewise: `{"type": "video", "video": ..., "fps": ...}`, or a column
    `videos` (or `video`), anything that `fastllm.videos.open_video` takes. Rows without media may stand beside others.

    Args:
        max_seq_length: tokens of a row, those of images and videos included; the model's where left out.
        formatting_func: makes the row out of what the data set holds.
        resize, resize_dimension, snap_to_patch_size: the size of images and frames, see `fastllm.images.ImageSize`;
            `"min"` is the vision tower's own, `"max"` leaves it to the processor.
        train_on_responses_only: loss on the assistant's answers, found from the chat template, or between
            `instruction_part` and `response_part` where both are given. `last_response_only`: on the last one.
        completion_only_loss: loss on the completion of `prompt` and `completion` rows.
        pad_to_multiple_of: of the batch's length.
        padding_free: lay the rows of a batch end to end in one, with positions that keep them apart, so that no token
            is padding. For models whose fast layers take such rows. `SFTConfig(padding_free=True)` asks for the same,
            and `packing=True` also puts whole rows together, up to its `max_length`.
        ignore_index: the label of what is not trained: padding, media tokens, and what the above leave out.
        num_proc: accepted, and not needed.

    Raises, when called: `DataError` with the row and what is wrong with it.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Any], Row] | None = None,
        resize: str | int | tuple[int, int] = "min",
        ignore_index: int = IGNORED,
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        force_match: bool = True,
        num_proc: int | None = None,
        completion_only_loss: bool = True,
        pad_to_multiple_of: int | None = None,
        resize_dimension: int | str = 0,
        snap_to_patch_size: bool = False,
        last_response_only: bool = False,
        padding_free: bool = False,
    ) -> None:
        if not hasattr(processor, "image_processor"):
            raise ArgumentError(
                f"got a {type(processor).__name__}, which has no image processor", where="VisionDataCollator",
                fix="pass the processor, the second of the two that FastVisionModel.from_pretrained returns",
            )  # fmt: skip
        if num_proc is not None:
            notice("fastllm: num_proc is not needed: rows are collated where the data loader runs", once="vision:proc")
        vision = getattr(model.config, "vision_config", None)
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self._encoder = RowEncoder(processor)
        self.max_seq_length = max_seq_length or getattr(model, "max_seq_length", None)
        self._is_limited = max_seq_length is not None
        self.formatting_func = formatting_func
        self.ignore_index = ignore_index
        self.responses_only = train_on_responses_only
        self.last_response_only = last_response_only
        self.completion_only_loss = completion_only_loss
        self.pad_to_multiple_of = pad_to_multiple_of
        self.size = ImageSize.of(resize, resize_dimension, _patch(vision) if snap_to_patch_size else 1, vision)
        self.media_ids = _media_ids(processor, model.config)
        self.padding_free = False
        self._row_positions = getattr(model, "row_positions", None)
        self._model_type = getattr(model.config, "model_type", type(model).__name__)
        if padding_free:
            self.drop_padding()
        self._dtype = getattr(model, "dtype", torch.float32)
        self._by_markers: Callable[[Any], Any] | None = None
        if train_on_responses_only and (instruction_part is not None or response_part is not None):
            self._by_markers = responses_of(
                None, instruction_part, response_part, force_match, tokenizer=self.tokenizer, return_function=True,
                last_response_only=last_response_only,
            )  # fmt: skip

    def limit_length(self, max_length: int) -> None:
        """Take the trainer's length, unless the collator was given one of its own."""
        if not self._is_limited:
            self.max_seq_length = max_length

    def drop_padding(self) -> None:
        """Lay rows end to end from now on. Errors: `UnsupportedError` for a model that could not keep them apart."""
        if self._row_positions is None:
            raise UnsupportedError(
                f"nothing keeps the rows of a batch apart in {self._model_type} once they are one: its layers run "
                "transformers' own forward, or its images need a mask",
                where="padding_free", fix="leave padding_free out: the batch is then padded",
            )  # fmt: skip
        self.padding_free = True

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels` [rows, tokens], and what the model takes for its images and videos.

        Padding-free: `input_ids`, `labels` [1, tokens], `position_ids` [.., 1, tokens] instead of `attention_mask`.
        """
        rows = [row for item in rows for row in _unpacked(item)]
        examples = [self._named(self._example, row, f"row {number} of the batch") for number, row in enumerate(rows)]
        batch = self._processed(examples)
        kept = [index for index, example in enumerate(examples) if self._fits(batch, index, example)]
        if not kept:
            raise DataError(
                f"no row of the batch has its images and videos within {self.max_seq_length} tokens",
                where=examples[0].name, fix="raise max_seq_length, or make them smaller with resize=",
            )  # fmt: skip
        if len(kept) < len(examples):
            examples = [examples[index] for index in kept]
            batch = self._processed(examples)
        batch["labels"] = torch.stack([self._labels(batch, i, example) for i, example in enumerate(examples)])
        batch = self._cut(batch)
        if (batch["labels"] == self.ignore_index).all():
            raise DataError(
                "no token of the batch is trained: its answers are empty or cut off", where=examples[0].name,
                fix="raise max_seq_length, or look at a row with processor.apply_chat_template",
            )  # fmt: skip
        if self.padding_free:
            batch = self._end_to_end(batch)
        pixels = {name for name, value in batch.items() if value.is_floating_point()} - _EXACT
        return {name: value.to(self._dtype) if name in pixels else value for name, value in batch.items()}

    def count_tokens(self, row: Row, number: int) -> int | None:
        """Tokens of row `number` of a data set, as a batch has them: cut to the length; None for a row that is left
        out, which is said. Errors: those of a batch."""
        example = self._named(self._example, row, f"row {number} of the data set")
        batch = self._processed([example])
        if not self._fits(batch, 0, example):
            return None
        return min(batch["input_ids"].shape[1], self.max_seq_length or batch["input_ids"].shape[1])

    def _named(self, make: Callable[[Row], Example], row: Row, place: str) -> Example:
        """The example of a row; what is wrong with it is told with the row's place and its first words."""
        try:
            example = make(row)
        except (FastllmError, TemplateError) as error:
            kind, cause, fix = DataError, str(error), ""
            if isinstance(error, FastllmError):
                kind, cause, fix = type(error), error.cause, error.fix
            place = ", ".join(filter(None, (describe(row, place), getattr(error, "where", ""))))
            raise kind(cause, where=place, fix=fix) from error
        example.name = describe(row, place)
        return example

    def _example(self, row: Row) -> Example:
        row = self.formatting_func(row) if self.formatting_func is not None else row
        row = {"messages": row} if isinstance(row, (list, tuple)) else without_nulls(row)
        if not isinstance(row, Mapping):
            raise DataError(f"a row is {type(row).__name__}, not a dict or a list of messages")
        media, spans = column_media(row), None
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            spans = [(len(prompt), len(text))] if self.completion_only_loss else None
        elif isinstance(prompt, list) and isinstance(completion, list):
            messages, media = placed_media(messages_of({"messages": prompt + completion}), media)
            text, spans = self._rendered(messages, row, len(prompt) if self.completion_only_loss else 0)
        elif prompt is not None and completion is not None:
            raise DataError("prompt and completion must both be text or both be messages")
        elif conversation_column(row) is not None:
            messages, media = placed_media(messages_of(row), media)
            text, spans = self._rendered(messages, row)
        elif isinstance(row.get("text"), str):
            text = row["text"]
        else:
            raise DataError(f"the row has no conversation, only {sorted(map(str, row))}")
        example = self._opened(text, spans, media)
        self._check_placeholders(example)
        return example

    def _rendered(
        self, messages: list[Message], row: Mapping[str, Any], first: int = 0
    ) -> tuple[str, list[Span] | None]:
        """The text of a conversation, and what of it is trained: answers from message `first` on; None for all."""
        finder, tools = self._encoder.finder(row.get("chat_template_kwargs")), tools_of(row)
        if not (first or self.responses_only) or self._by_markers is not None:
            return finder.renderer.render(messages, tools), None
        found = finder.find(messages, tools)
        trained = [span for span in found.spans if span.message >= first and is_trained(messages[span.message])]
        spans = [(span.start, span.end) for span in trained]
        return found.text, spans[-1:] if self.last_response_only else spans

    def _opened(self, text: str, spans: list[Span] | None, media: Media) -> Example:
        if media.videos and getattr(self.processor, "video_processor", None) is None:
            lacking = importlib.util.find_spec("torchvision") is None
            raise UnsupportedError(
                "it has a video, and " + ("torchvision is not installed" if lacking else "the processor takes none"),
                fix='pip install "fastllm[vision]"' if lacking else "pass the frames of the video as images",
            )
        images = [_at(f"image {i}", self._image, source) for i, source in enumerate(media.images)]
        videos = [_at(f"video {i}", self._video, *given) for i, given in enumerate(media.videos)]
        return Example(text, images, videos, spans)

    def _image(self, source: Any) -> Any:
        return self.size.apply(open_image(source))

    def _video(self, source: Any, options: Mapping[str, Any]) -> Video:
        video = open_video(source, **options)
        return Video([self.size.apply(frame) for frame in video.frames], video.fps)

    def _check_placeholders(self, example: Example) -> None:
        image_token = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        tokens = {"image": image_token, "video": getattr(self.processor, "video_token", None)}
        for (kind, token), held in zip(tokens.items(), (example.images, example.videos), strict=True):
            if token is not None and (count := example.text.count(token)) != len(held):
                raise DataError(
                    f"it has {len(held)} {kind}s, but its text has {count} places for one, {token!r}",
                    fix=f"check that the chat template shows {kind}s, and that no message spells out the placeholder",
                )

    def _processed(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The processor's batch. Where it fails, the row that it fails for is looked for."""
        images = [example.images for example in examples]
        options = _video_inputs([video for example in examples for video in example.videos])
        if self.pad_to_multiple_of is not None and not self.padding_free:
            options["pad_to_multiple_of"] = self.pad_to_multiple_of
        try:
            batch = self.processor(
                images=images if all(images) else [image for row in images for image in row] or None,
                text=[example.text for example in examples],
                padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt", **options,
            )  # fmt: skip
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            if len(examples) > 1:
                for example in examples:
                    self._processed([example])
            raise DataError(
                f"the processor refuses it: {str(error).splitlines()[0]}", where=examples[0].name
            ) from error
        ragged = [name for name in self.processor.model_input_names if isinstance(batch.get(name), list)]
        if ragged:
            raise UnsupportedError(
                f"{type(self.processor).__name__} gives {', '.join(ragged)} as lists, which make no batch",
                where=examples[0].name, fix="bring the images to one size with resize=(width, height)",
            )  # fmt: skip
        batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        self._check_counts(batch, examples)
        return batch

    def _check_counts(self, batch: Mapping[str, torch.Tensor], examples: Sequence[Example]) -> None:
        """Each row has as many media tokens as the processor made features for it."""
        for kind, held in (("image", [e.images for e in examples]), ("video", [e.videos for e in examples])):
            grids, token = batch.get(f"{kind}_grid_thw"), getattr(self.processor, f"{kind}_token_id", None)
            merge_size = getattr(getattr(self.processor, f"{kind}_processor", None), "merge_size", None)
            if grids is None or token is None or merge_size is None:
                continue
            expected = (grids.prod(-1) // merge_size**2).split([len(media) for media in held])
            for ids, sizes, example in zip(batch["input_ids"], expected, examples, strict=True):
                if (count := int((ids == token).sum())) != int(sizes.sum()):
                    raise DataError(
                        f"it has {count} {kind} tokens, and the processor made {int(sizes.sum())} features for them",
                        where=example.name, fix=f"check that no message spells out the {kind} token",
                    )  # fmt: skip

    def _fits(self, batch: Mapping[str, torch.Tensor], index: int, example: Example) -> bool:
        """Whether all media tokens of a row are within the length. Tells what happens to a row that is too long."""
        ids, length = batch["input_ids"][index], int(batch["attention_mask"][index].sum())
        limit = self.max_seq_length
        if limit is None or length <= limit:
            return True
        fits = not self._is_media(ids[limit:length]).any()
        fate = "text at its end is cut" if fits else "its images or videos don't fit, so it is left out"
        warn(
            f"{example.name} has {length:,} tokens, more than max_seq_length={limit:,}: {fate}",
            once="long" if fits else None,
        )
        return fits

    def _is_media(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.isin(ids, torch.tensor(sorted(self.media_ids), dtype=ids.dtype))

    def _labels(self, batch: Mapping[str, torch.Tensor], index: int, example: Example) -> torch.Tensor:
        ids = batch["input_ids"][index]
        hidden = (batch["attention_mask"][index] == 0) | self._is_media(ids)
        if example.spans is not None:
            hidden |= ~self._trained(ids, int(batch["attention_mask"][index].sum()), example)
        elif self._by_markers is not None:
            masked = self._by_markers({"input_ids": [ids.tolist()]})["labels"][0]
            hidden |= torch.tensor(masked) == IGNORED
        return ids.masked_fill(hidden, self.ignore_index)

    def _trained(self, ids: torch.Tensor, length: int, example: Example) -> torch.Tensor:
        """Which of a row's tokens its spans cover."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()  # that of the batch before
        encoding = backend.encode(example.text, add_special_tokens=False)
        wanted = [False] * len(encoding.ids)
        for start, end in example.spans or ():
            first, after = token_range(encoding, start, end, len(example.text))
            wanted[first:after] = [True] * (after - first)
        spread = spread_over_media(wanted, encoding.ids, ids[:length].tolist(), self.media_ids)
        if spread is None:
            raise UnsupportedError(
                f"{type(self.processor).__name__} changes the text around media, so the answers can't be followed by "
                "position", where=example.name, fix="give instruction_part and response_part",
            )  # fmt: skip
        return torch.tensor(spread + [False] * (len(ids) - length))

    def _cut(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        limit = self.max_seq_length
        if limit is None or batch["input_ids"].shape[1] <= limit:
            return batch
        return {**batch, **{name: batch[name][:, :limit] for name in _by_token(batch)}}

    def _end_to_end(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The rows of a padded batch as one, without the padding."""
        assert self._row_positions is not None
        shown = batch["attention_mask"] != 0
        positions = self._row_positions(batch)[..., shown].unsqueeze(-2)
        batch["labels"][:, 0] = self.ignore_index  # nothing precedes a row's first token
        flat = {name: batch[name][shown][None] for name in _by_token(batch) if name != "attention_mask"}
        flat = {**batch, **flat, "position_ids": positions}
        del flat["attention_mask"]
        filling = -flat["input_ids"].shape[1] % (self.pad_to_multiple_of or 1)
        if filling:  # at the end, as a row of its own
            fill = {"input_ids": self.tokenizer.pad_token_id, "labels": self.ignore_index}
            for name in [*_by_token(flat)]:
                flat[name] = F.pad(flat[name], (0, filling), value=fill.get(name, 0))
            tail = torch.arange(filling).expand(*positions.shape[:-1], -1)
            flat["position_ids"] = torch.cat([positions, tail], dim=-1)
        return flat


def _unpacked(item: Any) -> list[Row]:
    """The rows of a group that was packed to a length; any other row as it is."""
    return item["packed"] if isinstance(item, Mapping) and "packed" in item else [item]


def _by_token(batch: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the values with one entry for each token."""
    shape = batch["input_ids"].shape
    return [name for name, value in batch.items() if value.shape[:2] == shape and not value.is_floating_point()]


def spread_over_media(
    wanted: Sequence[bool], ids: Sequence[int], expanded: Sequence[int], media: set[int]
) -> list[bool] | None:
    """`wanted`, a flag for each of `ids`, for the tokens of `expanded`, where each placeholder of `ids` has become any
    number of tokens, all unwanted. None where the text between them is not the same."""
    spread: list[bool] = []
    position = 0
    while position < len(ids):
        end = next((i for i in range(position, len(ids)) if ids[i] in media), len(ids))
        segment = list(ids[position:end])
        # The first stretch of text is where the row begins, the last where it ends, each other where it comes next.
        starts: Sequence[int] = range(len(spread), len(expanded))
        if end == len(ids):
            starts = [len(expanded) - len(segment)]
        if position == 0:
            starts = [at for at in (0,) if end < len(ids) or len(segment) == len(expanded)]
        at = next((i for i in starts if i >= len(spread) and list(expanded[i : i + len(segment)]) == segment), None)
        if at is None:
            return None
        spread += [False] * (at - len(spread)) + list(wanted[position:end])
        position = next((i for i in range(end, len(ids)) if ids[i] not in media), len(ids))
    return spread + [False] * (len(expanded) - len(spread))


def _at(place: str, make: Callable[..., Any], *given: Any) -> Any:
    """`make(*given)`; what is wrong is told with its place in the row."""
    try:
        return make(*given)
    except FastllmError as error:
        where = ", ".join(filter(None, (place, error.where)))
        raise type(error)(error.cause, where=where, fix=error.fix) from error


def _video_inputs(videos: Sequence[Video]) -> dict[str, Any]:
    """What the processor takes for videos: arrays [T, H, W, 3] as they are, and how fast they run."""
    if not videos:
        return {}
    if any(video.fps is None for video in videos):
        notice(
            'fastllm: a video has no fps beside its frames: the processor takes its own rate; give "fps" in its part',
            once="vision:fps",
        )
    metadata = [
        {"total_num_frames": len(v.frames), "fps": v.fps, "frames_indices": list(range(len(v.frames)))} for v in videos
    ]
    arrays = [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos]
    return {"videos": arrays, "video_metadata": metadata, "do_sample_frames": False}


def _media_ids(processor: Any, config: Any) -> set[int]:
    """Ids of the tokens that stand for images, videos and sounds."""
    names = [f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index")]
    ids = {getattr(owner, name, None) for owner in (processor, config) for name in names}
    ids |= set(getattr(processor, "image_token_ids", None) or ())
    boi = getattr(processor, "boi_token", None)
    ids.add(tokenizer_of(processor).convert_tokens_to_ids(boi) if boi is not None else None)
    return {token for token in ids if isinstance(token, int)}


def _patch(vision_config: Any) -> int:
    patch = getattr(vision_config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else max(patch)
    return patch * getattr(vision_config, "spatial_merge_size", 1)


UnslothVisionDataCollator = VisionDataCollator

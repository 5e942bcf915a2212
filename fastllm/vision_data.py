"""Batches of conversations with images, for any trainer: `VisionDataCollator`.

Each row goes through the chat template, its images through the processor, and a batch comes out padded on the right, or
with its rows end to end. Image tokens are never cut: a row that is too long loses text after its last image, or is left
out, and it is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ._errors import ArgumentError, DataError, FastllmError, UnsupportedError
from ._notices import notice, warn
from .images import ImageSize, open_image
from .text.encoding import IGNORED, token_range
from .text.formats import conversation_column, messages_of, without_nulls
from .text.rendering import ChatRenderer, Message, tokenizer_of
from .text.response_spans import ResponseFinder
from .text.responses import train_on_responses_only as responses_of
from .text.sandbox import TemplateError

if TYPE_CHECKING:
    from PIL.Image import Image

Row = Any
_IMAGE_TYPES = ("image", "image_url", "input_image")
_LATER = ("video", "video_url", "audio", "audio_url", "input_audio")


@dataclass
class Example:
    """A row ready for the processor. `spans` are the characters of `text` that are trained; None for all."""

    name: str
    text: str
    images: list[Image] = field(default_factory=list)
    spans: list[tuple[int, int]] | None = None


class VisionDataCollator:
    """Turns rows with messages and images into a batch for training.

    Rows are `{"messages": [...]}`, `{"conversations": [...]}`, `{"prompt": ..., "completion": ...}`, `{"text": ...}` or
    a list of messages. Images stand in the messages, `{"type": "image", "image": ...}`, or in a column `images` (or
    `image`), in the order of the messages' image parts; without such parts they go before the first question. Each is
    anything that `fastllm.images.open_image` opens. Rows without images may stand beside rows with some.

    Args:
        max_seq_length: tokens of a row, image tokens included; the model's where left out.
        formatting_func: makes the row out of what the data set holds.
        resize, resize_dimension, snap_to_patch_size: the images' size, see `fastllm.images.ImageSize`; `"min"` is the
            vision tower's own, `"max"` leaves it to the processor.
        train_on_responses_only: loss on the assistant's answers, found from the chat template, or between
            `instruction_part` and `response_part` where both are given. `last_response_only`: on the last one.
        completion_only_loss: loss on the completion of `prompt` and `completion` rows.
        pad_to_multiple_of: of the batch's length.
        padding_free: lay the rows of a batch end to end in one, with positions that keep them apart, so that no token
            is padding. For models whose fast layers take such rows.
        ignore_index: the label of what is not trained: padding, image tokens, and what the above leave out.
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
                f"{self._model_type} has no fast layers that keep the rows of a batch apart once they are one",
                where="padding_free", fix="leave padding_free out: the batch is then padded",
            )  # fmt: skip
        self.padding_free = True

    @functools.cached_property
    def _finder(self) -> ResponseFinder:
        return ResponseFinder(self._renderer)

    @functools.cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self.processor)

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels` [rows, tokens], and what the model takes for its images.

        Padding-free: `input_ids`, `labels` [1, tokens], `position_ids` [.., 1, tokens] instead of `attention_mask`.
        """
        examples = [self._named(self._example, row, number) for number, row in enumerate(rows)]
        batch = self._processed(examples)
        kept = [index for index, example in enumerate(examples) if self._fits(batch, index, example)]
        if not kept:
            raise DataError(
                f"no row of the batch has its images within {self.max_seq_length} tokens", where=examples[0].name,
                fix="raise max_seq_length, or make the images smaller with resize=",
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
        return {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in batch.items()}

    def _named(self, make: Callable[[Row], Example], row: Row, number: int) -> Example:
        """The example of a row; what is wrong with it is told with the row's place and its first words."""
        try:
            example = make(row)
        except (DataError, TemplateError) as error:
            cause, fix = (error.cause, error.fix) if isinstance(error, FastllmError) else (str(error), "")
            place = ", ".join(filter(None, (_describe(row, number), getattr(error, "where", ""))))
            raise DataError(cause, where=place, fix=fix) from error
        example.name = _describe(row, number)
        return example

    def _example(self, row: Row) -> Example:
        row = self.formatting_func(row) if self.formatting_func is not None else row
        row = {"messages": row} if isinstance(row, (list, tuple)) else without_nulls(row)
        if not isinstance(row, Mapping):
            raise DataError(f"a row is {type(row).__name__}, not a dict or a list of messages")
        column = row.get("images", row.get("image"))
        images = list(column) if isinstance(column, (list, tuple)) else [column] if column is not None else []
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            trained = [(len(prompt), len(prompt + completion))] if self.completion_only_loss else None
            example = Example("", prompt + completion, images, trained)
        elif prompt is not None and completion is not None:
            messages, images = _with_images(messages_of({"messages": [*prompt, *completion]}), images)
            example = self._conversation(messages, images, len(prompt) if self.completion_only_loss else 0)
        elif conversation_column(row) is not None:
            messages, images = _with_images(messages_of(row), images)
            example = self._conversation(messages, images)
        elif isinstance(row.get("text"), str):
            example = Example("", row["text"], images)
        else:
            raise DataError(f"the row has no conversation, only {sorted(map(str, row))}")
        example.images = [self._image(image, number) for number, image in enumerate(example.images)]
        self._check_placeholders(example)
        return example

    def _conversation(self, messages: list[Message], images: list[Any], first: int = 0) -> Example:
        if not (first or self.responses_only) or self._by_markers is not None:
            return Example("", self._renderer.render(messages), images)
        found = self._finder.find(messages)
        spans = [(span.start, span.end) for span in found.spans if span.message >= first]
        return Example("", found.text, images, spans[-1:] if self.last_response_only else spans)

    def _image(self, source: Any, number: int) -> Image:
        try:
            return self.size.apply(open_image(source))
        except DataError as error:
            raise DataError(error.cause, where=f"image {number}", fix=error.fix) from error

    def _check_placeholders(self, example: Example) -> None:
        token = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        if token is not None and (count := example.text.count(token)) != len(example.images):
            raise DataError(
                f"it has {len(example.images)} images, but its text has {count} places for one, {token!r}",
                fix="check that the chat template shows images, and that no message spells out the placeholder",
            )  # fmt: skip

    def _processed(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The processor's batch. Where it fails, the row that it fails for is looked for."""
        images = [example.images for example in examples]
        multiple = None if self.padding_free else self.pad_to_multiple_of
        options = {} if multiple is None else {"pad_to_multiple_of": multiple}
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
        return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def _fits(self, batch: Mapping[str, torch.Tensor], index: int, example: Example) -> bool:
        """Whether all image tokens of a row are within the length. Tells what happens to a row that is too long."""
        ids, length = batch["input_ids"][index], int(batch["attention_mask"][index].sum())
        limit = self.max_seq_length
        if limit is None or length <= limit:
            return True
        fits = not self._is_media(ids[limit:length]).any()
        fate = "text at its end is cut" if fits else "its images don't fit, so it is left out"
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
        encoding = self.tokenizer.backend_tokenizer.encode(example.text, add_special_tokens=False)
        wanted = [False] * len(encoding.ids)
        for start, end in example.spans or ():
            first, after = token_range(encoding, start, end, len(example.text))
            wanted[first:after] = [True] * (after - first)
        spread = spread_over_media(wanted, encoding.ids, ids[:length].tolist(), self.media_ids)
        if spread is None:
            raise UnsupportedError(
                f"{type(self.processor).__name__} changes the text around images, so the answers can't be followed by "
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
        positions = self._row_positions(batch)[:, shown][:, None]
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


def _with_images(messages: list[Message], column: list[Any]) -> tuple[list[Message], list[Any]]:
    """The messages with bare image parts, and the images in order: the column's for the parts that have none."""
    waiting, images = list(column), []
    result = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [_bare_part(part, waiting, images) for part in content]
            message = {**message, "content": parts}
        result.append(message)
    if waiting and not images:
        first = next((i for i, message in enumerate(result) if message["role"] == "user"), 0)
        content = result[first].get("content") or ""
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        result[first] = {**result[first], "content": [*({"type": "image"} for _ in waiting), *parts]}
        return result, waiting
    if waiting:
        raise DataError(f"its column has {len(column)} images, {len(waiting)} more than its messages have places for")
    return result, images


def _bare_part(part: Any, waiting: list[Any], images: list[Any]) -> Any:
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    if kind in _LATER or any(name in part for name in _LATER):
        raise UnsupportedError(
            f"a message has {kind or 'video or audio'}, and this version takes images only",
            where="VisionDataCollator", fix="pass the frames of a video as images",
        )  # fmt: skip
    source = next((part[name] for name in _IMAGE_TYPES if part.get(name) is not None), None)
    if kind not in _IMAGE_TYPES and source is None:
        return part
    if source is None:
        source = next((part[name] for name in ("url", "path", "bytes") if part.get(name) is not None), None)
    if source is None:
        if not waiting:
            raise DataError("a message has a place for an image, and no image is left for it in the row")
        source = waiting.pop(0)
    images.append(source)
    return {"type": "image"}


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


def _describe(row: Row, number: int) -> str:
    """Where the row stands, with its own name if it has one, or its first words."""
    place = f"row {number} of the batch"
    if isinstance(row, Mapping):
        if row.get("id") is not None:
            return f"{place}, id {row['id']!r}"
        row = row.get("messages") or row.get("conversations") or row.get("prompt") or ""
    words = row if isinstance(row, str) else " ".join(_texts(row))
    return f"{place}, {words[:60]!r}" if words else place


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        shown = [value[key] for key in ("content", "value", "text") if value.get(key) is not None]
        return [text for item in shown for text in ([item] if isinstance(item, str) else _texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, (list, tuple)) else []


UnslothVisionDataCollator = VisionDataCollator

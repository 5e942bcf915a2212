"""Rows of conversations with media: where their images and videos stand, and which row an error is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ._errors import DataError, UnsupportedError
from ._notices import notice
from .text.rendering import Message

# What a message's part of each kind is called; its source stands under the same names.
_TYPES = {"image": ("image", "image_url", "input_image"), "video": ("video", "video_url")}
_SOURCES = ("url", "path", "bytes")
_AUDIO = ("audio", "audio_url", "input_audio")
# What a part may say besides, for videos alone.
_VIDEO_OPTIONS = {"fps": "fps", "sample_fps": "fps", "nframes": "num_frames", "num_frames": "num_frames",
                  "max_frames": "max_frames"}  # fmt: skip
_SIZES = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
_SECTIONS = ("video_start", "video_end", "min_frames")


@dataclass
class Media:
    """The sources of a row's images and videos, in the order of the conversation; of videos with what is said of each
    to `fastllm.videos.open_video`."""

    images: list[Any] = field(default_factory=list)
    videos: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)


def column_media(row: Mapping[str, Any]) -> Media:
    """What the row's columns hold: `images` or `image`, `videos` or `video`."""
    if any(row.get(name) is not None for name in ("audio", "audios")):
        raise _unsupported("audio")
    images = row.get("images", row.get("image"))
    videos = row.get("videos")
    if videos is None:
        videos = [row["video"]] if row.get("video") is not None else []
    images = images if isinstance(images, (list, tuple)) else [images] if images is not None else []
    videos = videos if isinstance(videos, (list, tuple)) else [videos]
    return Media(list(images), [(video, {}) for video in videos])


def placed_media(messages: list[Message], columns: Media) -> tuple[list[Message], Media]:
    """The messages with bare parts, and their media in order: the columns' for the parts that hold none.

    Where no message has parts for a column's media, they stand where the text says `<image>` or `<video>`; where it
    does not, before the first question.
    """
    waiting = {"image": list(columns.images), "video": list(columns.videos)}
    found: dict[str, list[Any]] = {"image": [], "video": []}
    result = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            message = {**message, "content": [_bare_part(part, waiting, found) for part in content]}
        result.append(message)
    unplaced = [kind for kind, sources in waiting.items() if sources and not found[kind]]
    places = []
    for kind in unplaced:
        marked = sum(text.count(f"<{kind}>") for message in result for text in _own_texts(message))
        if marked not in (0, len(waiting[kind])):
            raise DataError(f"its messages say <{kind}> {marked} times, and its column has {len(waiting[kind])}")
        if marked:
            result = [_with_places(message, kind) for message in result]
        else:
            places += [{"type": kind} for _ in waiting[kind]]
    if places:
        first = next((i for i, message in enumerate(result) if message["role"] == "user"), 0)
        result[first] = {**result[first], "content": [*places, *_parts(result[first])]}
    for kind, sources in waiting.items():
        if sources and kind not in unplaced:
            total = len(sources) + len(found[kind])
            raise DataError(f"its column has {total} {kind}s, {len(sources)} more than its messages have places for")
        found[kind] += sources
    return result, Media(found["image"], found["video"])


def _parts(message: Message) -> list[Any]:
    content = message.get("content") or ""
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _own_texts(message: Message) -> list[str]:
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in _parts(message)]
    return [text for text in texts if isinstance(text, str)]


def _with_places(message: Message, kind: str) -> Message:
    """A part in place of each `<image>` of a message's text."""
    marker = f"<{kind}>"
    if not any(marker in text for text in _own_texts(message)):
        return message
    parts: list[Any] = []
    for part in _parts(message):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            parts.append(part)
            continue
        for number, piece in enumerate(text.split(marker)):
            parts += [{"type": kind}] if number else []
            parts += [{"type": "text", "text": piece}] if piece else []
    return {**message, "content": parts}


def _bare_part(part: Any, waiting: dict[str, list[Any]], found: dict[str, list[Any]]) -> Any:
    """A part without its source, which goes to those found."""
    if not isinstance(part, Mapping):
        return part
    named = part.get("type")
    if named in _AUDIO or any(name in part for name in _AUDIO):
        raise _unsupported("audio")
    kind = next((k for k, names in _TYPES.items() if named in names or any(part.get(n) is not None for n in names)), "")
    if not kind:
        return part
    source = next((part[name] for name in (*_TYPES[kind], *_SOURCES) if part.get(name) is not None), None)
    _check_settings(part)
    if source is None:
        if not waiting[kind]:
            raise DataError(f"a message has a place for media, and no {kind} is left for it in the row")
        source = waiting[kind].pop(0)
    elif kind == "video":
        source = (source, {_VIDEO_OPTIONS[name]: part[name] for name in _VIDEO_OPTIONS if part.get(name) is not None})
    found[kind].append(source)
    return {"type": kind}


def _check_settings(part: Mapping[str, Any]) -> None:
    """Tell or refuse what other libraries let a part say of its own treatment."""
    if any(name in part for name in _SECTIONS):
        names = ", ".join(name for name in _SECTIONS if name in part)
        raise UnsupportedError(
            f"{names} of a video is not part of this version", fix="give the frames wanted in a list"
        )
    sizes = ", ".join(name for name in _SIZES if name in part)
    if sizes:
        notice(
            f"fastllm: {sizes} beside an image or a video is not read: use the collator's resize=", once="vision:part"
        )


def _unsupported(kind: str) -> UnsupportedError:
    return UnsupportedError(
        f"a row has {kind}, and this version takes images and videos only", where="VisionDataCollator"
    )


def describe(row: Any, place: str) -> str:
    """Where the row stands, with its own name if it has one, or its first words."""
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

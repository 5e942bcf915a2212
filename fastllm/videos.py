"""Videos of training rows: frames in a list, or decoded from a file where a decoder is installed."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._errors import DataError, MissingPackageError
from .images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

# Package -> transformers' name for it, the first one that is installed decodes.
_DECODERS = {"torchcodec": "torchcodec", "av": "pyav", "decord": "decord", "cv2": "opencv"}
_TAKE_BYTES = ("torchcodec", "pyav", "decord")
_FPS, _MAX_FRAMES = 2.0, 768  # what Qwen-VL models were trained with


@dataclass
class Video:
    """RGB frames of one size, and how many of them make a second, where that is known."""

    frames: list[Image]
    fps: float | None = None


def open_video(
    source: Any, fps: float | None = None, num_frames: int | None = None, max_frames: int = _MAX_FRAMES
) -> Video:
    """The video of a list of frames (each as `fastllm.images.open_image` takes it), an array of bytes [T, H, W, 3], a
    video file's path or bytes, or a dict with one of these under `frames`, `video`, `bytes`, `path` or `url`.

    Args:
        fps: of frames in a list or an array, how many make a second; of a file, how many are taken a second (2 where
            left out).
        num_frames: frames taken from a file, evenly spaced, whatever its length.
        max_frames: the most that are taken from a file.

    Errors: `DataError` for one that is damaged, empty, missing or on the network, and for frames of several sizes;
    `MissingPackageError` for a file where no decoder is installed.
    """
    if isinstance(source, Mapping):
        names = ("frames", "video", "bytes", "path", "url")
        inner = next((source[name] for name in names if source.get(name) is not None), None)
        if inner is None:
            raise DataError(f"a video is a dict with neither frames, bytes nor path, only {sorted(map(str, source))}")
        return open_video(inner, source.get("fps", fps), num_frames, max_frames)
    if isinstance(source, (str, os.PathLike, bytes, bytearray)):
        return _from_file(source, fps or _FPS, num_frames, max_frames)
    if hasattr(source, "__array__") and getattr(source, "ndim", 0) == 4:
        source = list(source)
    if not isinstance(source, (list, tuple)):
        raise DataError(
            f"a video is {type(source).__name__}, not a list of frames, an array [T, H, W, 3] or a file",
            fix='give its frames in a list, or its path; of a data set, cast_column("video", Video(decode=False))',
        )
    return Video(_same_size([_frame(frame, number) for number, frame in enumerate(source)]), fps)


def _frame(source: Any, number: int) -> Image:
    try:
        return open_image(source)
    except DataError as error:
        raise DataError(error.cause, where=f"frame {number}", fix=error.fix) from error


def _same_size(frames: list[Image]) -> list[Image]:
    if not frames:
        raise DataError("a video has no frames", fix="remove it from the data")
    other = next((number for number, frame in enumerate(frames) if frame.size != frames[0].size), None)
    if other is not None:
        raise DataError(
            f"frame {other} of a video has {frames[other].width} x {frames[other].height} pixels, its first "
            f"{frames[0].width} x {frames[0].height}",
            fix="bring the frames to one size",
        )
    return frames


def _from_file(source: Any, fps: float, num_frames: int | None, max_frames: int) -> Video:
    from transformers.video_utils import VIDEO_DECODERS

    name, opened = _existing(source)
    known = _TAKE_BYTES if isinstance(opened, io.BytesIO) else _DECODERS.values()
    installed = [backend for package, backend in _DECODERS.items() if importlib.util.find_spec(package) is not None]
    backend = next((each for each in installed if each in known), None)
    if backend is None:
        raise MissingPackageError(
            f"{name} is a video file, and no decoder is installed",
            fix="pip install av   (or give its frames in a list)",
        )
    try:
        decoded, metadata = VIDEO_DECODERS[backend](opened, _sampler(fps, num_frames, max_frames))
    except Exception as error:  # each decoder has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name} can't be decoded ({reason})", fix="remove or replace it in the data") from error
    if decoded.shape[1] == 3 and decoded.shape[-1] != 3:
        decoded = decoded.permute(0, 2, 3, 1)  # torchcodec gives [T, 3, H, W]
    return Video([open_image(frame) for frame in decoded], float(metadata.sampled_fps))


def _existing(source: Any) -> tuple[str, Any]:
    """(what to call it, what a decoder opens) of a file's bytes or path."""
    if isinstance(source, (bytes, bytearray)):
        return "the video", io.BytesIO(source)
    path = os.fspath(source).removeprefix("file://")
    if path.startswith(("http://", "https://")):
        raise DataError(f"{path!r} is on the network", fix="download the videos first and name their files")
    if not os.path.isfile(path):
        raise DataError(f"there is no file {path!r}", fix="check the path, or make it absolute")
    return repr(path), path


def _sampler(fps: float, num_frames: int | None, max_frames: int) -> Callable[..., Any]:
    import numpy as np

    def indices(metadata: Any, **_: Any) -> Any:
        total = metadata.total_num_frames
        if not total:
            raise ValueError("its number of frames is not known")
        wanted = num_frames or round(total / (metadata.fps or fps) * fps)
        count = max(1, min(wanted, max_frames, total))
        return np.arange(count) * total // count

    return indices

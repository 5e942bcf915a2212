"""Images of training rows: opened from whatever form a data set keeps them in, and brought to size.

Nothing is decoded before its header is read, so a picture that would fill the memory is refused first.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._errors import ArgumentError, DataError
from ._notices import notice

if TYPE_CHECKING:
    from PIL.Image import Image

_NO_IMAGE_SIZE = 512  # the limit of resize="min" where the model's config names none


def open_image(source: Any) -> Image:
    """The RGB image of a PIL image, a path, bytes, a `data:` address, an array of bytes [H, W] or [H, W, 3], or a dict
    with one of these under `bytes`, `path`, `url` or `image`, as data sets store them. Photographs are turned upright,
    as their EXIF says, and 16-bit gray is brought to 8.

    Errors: `DataError` for one that is damaged, too large, missing or on the network.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, Mapping):
        return open_image(_inner(source))
    name = f"{source!r}" if isinstance(source, (str, os.PathLike)) and len(str(source)) < 300 else "the image"
    try:
        image = source if isinstance(source, Image.Image) else _opened(source)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise DataError(
                f"{name} has {image.width:,} x {image.height:,} pixels, past the {limit:,} that are safe to decode",
                fix="make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS",
            )
        return _in_8_bits(ImageOps.exif_transpose(image), name).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {name}", fix="check the path, or make it absolute") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError, binascii.Error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name} can't be decoded ({reason})", fix="remove or replace it in the data") from error


def _inner(stored: Mapping[str, Any]) -> Any:
    found = next((stored[key] for key in ("bytes", "path", "url", "image") if stored.get(key) is not None), None)
    if found is None:
        raise DataError(f"an image is a dict with neither bytes nor path, only {sorted(map(str, stored))}")
    return found


def _opened(source: Any) -> Image:
    from PIL import Image

    if isinstance(source, (bytes, bytearray)):
        return Image.open(io.BytesIO(source))
    if isinstance(source, os.PathLike):
        return Image.open(source)
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            raise DataError(f"{source!r} is on the network", fix="download the images first and name their files")
        if source.startswith("data:"):
            return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
        return Image.open(source.removeprefix("file://"))
    if hasattr(source, "__array__"):
        return _from_array(source)
    raise DataError(f"an image is {type(source).__name__}, not a picture, a path or bytes")


def _in_8_bits(image: Image, name: str) -> Image:
    """Pillow's own conversion would make white of every pixel above 255."""
    import numpy as np

    if image.mode.startswith("I;16"):
        return _from_array((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        levels = np.asarray(image)
        low, high = levels.min(), levels.max()
        if image.mode == "F" or low < 0 or high > 255:
            raise DataError(
                f"{name} has pixels of mode {image.mode} from {low} to {high}", fix="bring them to 8 bits, 0 to 255"
            )
    return image


def _from_array(source: Any) -> Image:
    import numpy as np
    from PIL import Image

    array = np.asarray(source)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise DataError(
            f"an image is an array of {array.dtype} with shape {array.shape}", fix="use uint8 with shape [H, W, 3]"
        )
    return Image.fromarray(array)


@dataclass(frozen=True)
class ImageSize:
    """The size that images are brought to before the processor sees them.

    `limit` None leaves them, a number only shrinks and keeps the proportions, a pair `(width, height)` is the size
    itself. `side` is the one that the limit is for: 0 width, 1 height, "max" or "min" of both. Both sides are rounded
    to multiples of `multiple`.
    """

    limit: int | tuple[int, int] | None = None
    side: int | str = 0
    multiple: int = 1

    @classmethod
    def of(cls, resize: Any, side: Any, multiple: int, vision_config: Any) -> ImageSize:
        """From the arguments of the collator: `"min"` is the tower's own size, `"max"` leaves images as they are."""
        if side not in (0, 1, "max", "min"):
            raise ArgumentError(
                f"got {side!r}", where="resize_dimension", fix='use 0 (width), 1 (height), "max" or "min"'
            )
        if resize == "min":
            resize = getattr(vision_config, "image_size", None)
            if resize is None:
                resize = _NO_IMAGE_SIZE
                notice(
                    f'fastllm: the model has no image size of its own: resize="min" shrinks images to {resize} pixels; '
                    'resize="max" leaves them to the processor', once="vision:resize",
                )  # fmt: skip
        if resize == "max":
            return cls(None, side, multiple)
        if isinstance(resize, (list, tuple)) and len(resize) == 2 and all(_is_length(n) for n in resize):
            return cls((int(resize[0]), int(resize[1])), side, multiple)
        if isinstance(resize, int) and _is_length(resize):
            return cls(resize, side, multiple)
        raise ArgumentError(
            f"got {resize!r}", where="resize", fix='use "min", "max", a number of pixels or a pair of them'
        )

    def apply(self, image: Image) -> Image:
        from PIL.Image import Resampling

        width, height = image.size
        if isinstance(self.limit, tuple):
            width, height = self.limit
        elif self.limit is not None:
            sides = {0: width, 1: height, "max": max(width, height), "min": min(width, height)}
            scale = min(1.0, self.limit / sides[self.side])
            width, height = round(width * scale), round(height * scale)
        size = (self._rounded(width), self._rounded(height))
        return image if size == image.size else image.resize(size, Resampling.LANCZOS)

    def _rounded(self, length: int) -> int:
        return max(self.multiple, round(length / self.multiple) * self.multiple)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

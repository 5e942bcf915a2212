"""Read a GGUF file whose content is not trusted.

Nothing is allocated for a length before it is known to lie inside the file, and the whole tensor table is checked
before any tensor is handed out: no overlap, no gap, no tensor past the end.
"""

from __future__ import annotations

import mmap
import os
import struct
from types import TracebackType
from typing import Self

import numpy as np
import torch

from .container import (
    ALIGNMENT,
    ARRAY,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
    SCALAR_FORMATS,
    STRING,
    VERSION,
    GGUFError,
    TensorInfo,
    Value,
    align,
)
from .tensor_types import TENSOR_TYPES_BY_ID

_MAX_TENSORS = 200_000
_MAX_PAIRS = 100_000
_MAX_ELEMENTS = 2**48


class GGUFReader:
    """An open GGUF file: `metadata` as Python values, `tensors` by name, `data(name)` as raw bytes.

    A context manager. Raises `GGUFError` that names the file and the byte where it stops making sense.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < len(MAGIC) + 20:
                raise GGUFError("the file is shorter than a GGUF header", where=self.path)
            # Copy on write: tensors may then share the memory without being able to change the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.close()

    def close(self) -> None:
        """Unmap the file; views that are still held keep it mapped until they go."""
        try:
            self._map.close()
        except BufferError:
            return

    def data(self, name: str) -> torch.Tensor:
        """The stored bytes of a tensor: uint8 [rows, bytes of a row], a view of the mapped file."""
        info = self.tensors[name]
        start = self.data_offset + info.offset
        # By way of NumPy, whose array keeps the file mapped; torch.frombuffer would not.
        flat = torch.from_numpy(np.frombuffer(self._map, np.uint8, count=info.num_bytes, offset=start))
        return flat.view(-1, info.type.num_bytes(info.shape[-1:]))

    def _parse(self) -> None:
        self._at = 0
        if self._take(4) != MAGIC:
            raise GGUFError("not a GGUF file", where=self.path)
        version, num_tensors, num_pairs = self._unpack("IQQ")
        if version != VERSION:
            raise GGUFError(f"GGUF version {version} is not supported, only {VERSION}", where=self.path)
        if num_tensors > _MAX_TENSORS or num_pairs > _MAX_PAIRS:
            raise self._broken(f"{num_tensors} tensors and {num_pairs} metadata pairs are more than any model has")
        self.metadata: dict[str, Value] = {}
        for _ in range(num_pairs):
            key = self._string()
            if not key or key in self.metadata:
                raise self._broken(f"the key {key!r} is empty or there twice")
            self.metadata[key] = self._value(self._unpack("I")[0])
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        # A negative number can't pass: `n & (n - 1)` is not zero for it.
        if type(alignment) is not int or alignment == 0 or alignment & (alignment - 1) or alignment > 2**20:
            raise self._broken(f"general.alignment is {alignment!r}, not a power of two")
        self.tensors: dict[str, TensorInfo] = {}
        expected = 0
        for _ in range(num_tensors):
            info = self._tensor_info()
            if info.name in self.tensors:
                raise self._broken(f"tensor {info.name!r} is there twice")
            if info.offset != expected:
                raise self._broken(f"tensor {info.name!r} is at offset {info.offset} and not {expected}")
            expected = align(info.offset + info.num_bytes, alignment)
            self.tensors[info.name] = info
        self.data_offset = align(self._at, alignment)
        end = self.data_offset + max((info.offset + info.num_bytes for info in self.tensors.values()), default=0)
        if end > len(self._map):
            raise GGUFError(
                f"the file ends at byte {len(self._map):,}, its tensors at {end:,}: it was cut short",
                where=self.path,
                fix="write or download it again",
            )

    def _broken(self, cause: str) -> GGUFError:
        return GGUFError(f"{cause} (before byte {self._at:,})", where=self.path)

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._map):
            raise self._broken(f"{size:,} bytes are announced and {len(self._map) - self._at:,} are left")
        taken, self._at = self._map[self._at : end], end
        return taken

    def _unpack(self, layout: str) -> tuple:
        return struct.unpack("<" + layout, self._take(struct.calcsize("<" + layout)))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._broken("a string is not UTF-8") from error

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return self._string()
        if kind in SCALAR_FORMATS:
            return self._unpack(SCALAR_FORMATS[kind])[0]
        if kind != ARRAY:
            raise self._broken(f"there is no value kind {kind}")
        item_kind, length = self._unpack("IQ")
        if item_kind == STRING:
            # Each string takes at least the 8 bytes of its length.
            if length > (len(self._map) - self._at) // 8:
                raise self._broken(f"an array of {length:,} strings does not fit into the file")
            return [self._string() for _ in range(length)]
        if item_kind not in SCALAR_FORMATS:
            raise self._broken(f"an array can't hold values of kind {item_kind}")
        size = struct.calcsize("<" + SCALAR_FORMATS[item_kind])
        items = self._take(length * size)
        return list(struct.unpack(f"<{length}{SCALAR_FORMATS[item_kind]}", items))

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        if len(name.encode()) > MAX_NAME_BYTES:
            raise self._broken(f"tensor name {name[:80]!r} is longer than {MAX_NAME_BYTES} bytes")
        (num_dimensions,) = self._unpack("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._broken(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(reversed(self._unpack(f"{num_dimensions}Q")))
        type_id, offset = self._unpack("IQ")
        kind = TENSOR_TYPES_BY_ID.get(type_id)
        if kind is None:
            raise self._broken(f"tensor {name!r} has type {type_id}, which fastllm does not read")
        elements = 1
        for size in shape:
            elements *= size
        if not 0 < elements < _MAX_ELEMENTS or shape[-1] % kind.block_size:
            raise self._broken(f"tensor {name!r} has shape {shape}, which {kind.name} can't hold")
        return TensorInfo(name, shape, kind, offset)

"""The GGUF container, version 3, little endian.

    "GGUF" | version u32 | tensor count u64 | pair count u64
    per pair:    key | value kind u32 | value          (an array value is: kind u32 | length u64 | items)
    per tensor:  name | dimension count u32 | dimensions u64, innermost first | type id u32 | offset u64
    padding to `general.alignment`, then the tensors, each at its offset and padded to the alignment

A string is its length u64 and its UTF-8 bytes. Source: ggml's docs/gguf.md and gguf.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from .._errors import FastllmError
from .tensor_types import TensorType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_NAME_BYTES = 63  # llama.cpp keeps tensor names in 64 bytes with the final zero
MAX_DIMENSIONS = 4

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | list[bool] | list[int] | list[float] | list[str]
Metadata: TypeAlias = Mapping[str, Value]

STRING, ARRAY = 8, 9
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _UINT64, _INT64 = 4, 5, 6, 7, 10, 11


class GGUFError(FastllmError, ValueError):
    """A GGUF file that breaks the format, or content that does not fit into one."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table: `shape` in PyTorch order, `offset` in bytes from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def num_bytes(self) -> int:
        return self.type.num_bytes(self.shape)


def align(offset: int, alignment: int = ALIGNMENT) -> int:
    """The first multiple of `alignment` at or after `offset`."""
    return -(-offset // alignment) * alignment


def lay_out(tensors: Iterable[tuple[str, tuple[int, ...], TensorType]]) -> list[TensorInfo]:
    """Place tensors one after the other. Raises `GGUFError` for a name or shape that the format can't hold."""
    infos: list[TensorInfo] = []
    seen: set[str] = set()
    offset = 0
    for name, shape, kind in tensors:
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES or name in seen:
            raise GGUFError(f"tensor name {name!r} is empty, used twice or longer than {MAX_NAME_BYTES} bytes")
        if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 1 or shape[-1] % kind.block_size:
            raise GGUFError(f"shape {shape} can't be stored as {kind.name}", where=name)
        seen.add(name)
        infos.append(TensorInfo(name, tuple(shape), kind, offset))
        offset = align(offset + infos[-1].num_bytes)
    return infos


def encode_header(metadata: Metadata, tensors: list[TensorInfo]) -> bytes:
    """Everything before the tensor data, padding included. Raises `GGUFError` for a value that has no GGUF kind."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts.append(_encode_string(key))
        parts.append(_encode_value(key, value))
    for info in tensors:
        parts.append(_encode_string(info.name))
        parts.append(struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape)))
        parts.append(struct.pack("<IQ", info.type.id, info.offset))
    header = b"".join(parts)
    return header + bytes(align(len(header)) - len(header))


def data_bytes(tensors: list[TensorInfo]) -> int:
    """Bytes of the data section, the padding after the last tensor included."""
    return align(tensors[-1].offset + tensors[-1].num_bytes) if tensors else 0


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode_value(key: str, value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _encode_string(value)
    if not isinstance(value, list):
        kind = _scalar_kind(key, [value], _UINT32)
        return struct.pack("<I" + SCALAR_FORMATS[kind], kind, value)
    if not value:
        raise GGUFError("an empty list has no GGUF kind", where=key, fix="leave the key out")
    if all(isinstance(item, str) for item in value):
        head = struct.pack("<IIQ", ARRAY, STRING, len(value))
        return head + b"".join(_encode_string(str(item)) for item in value)
    kind = _scalar_kind(key, value, _INT32)
    return struct.pack(f"<IIQ{len(value)}{SCALAR_FORMATS[kind]}", ARRAY, kind, len(value), *value)


def _scalar_kind(key: str, values: list, preferred_int: int) -> int:
    """The one kind that holds all `values`: counts are u32 and arrays of numbers i32, as llama.cpp reads them."""
    if all(isinstance(value, bool) for value in values):
        return _BOOL
    if all(isinstance(value, float) for value in values):
        return _FLOAT32
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        limits = {_UINT32: (0, 2**32), _INT32: (-(2**31), 2**31), _UINT64: (0, 2**64), _INT64: (-(2**63), 2**63)}
        for kind in (preferred_int, _INT32, _UINT64, _INT64):
            low, high = limits[kind]
            if low <= min(values) and max(values) < high:
                return kind
    raise GGUFError(f"values of type {type(values[0]).__name__} have no single GGUF kind", where=key)

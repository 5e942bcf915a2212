"""Safetensors checkpoints, read and written one tensor at a time.

Reading maps the file: a tensor is a view until somebody touches it, so a checkpoint of any size costs no memory. A file
is checked like safetensors' own reader checks it before anything in it is used: header length and JSON, known dtypes,
sizes that agree with shapes, tensors that cover the data without gap or overlap.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._errors import ArgumentError, ModelError
from .._notices import notice
from ..gguf.atomic import AtomicFile, atomic_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000
_MAX_TENSORS = 200_000
# dtype of the format -> (bits of a value, torch's dtype where it has one)
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool), "U8": (8, torch.uint8), "I8": (8, torch.int8),
    "F8_E4M3": (8, torch.float8_e4m3fn), "F8_E5M2": (8, torch.float8_e5m2), "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz), "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "I16": (16, torch.int16), "U16": (16, torch.uint16), "F16": (16, torch.float16), "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32), "U32": (32, torch.uint32), "F32": (32, torch.float32),
    "I64": (64, torch.int64), "U64": (64, torch.uint64), "F64": (64, torch.float64), "C64": (64, torch.complex64),
    "F4": (4, None), "F6_E2M3": (6, None), "F6_E3M2": (6, None),
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, (_, dtype) in _DTYPES.items() if dtype is not None}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: `dtype` by the format's name, `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return _DTYPES[self.dtype][1]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype][0] // 8


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a torch dtype."""
    return _DTYPE_NAMES[dtype]


class SafetensorsFile:
    """An open file: `entries` and their byte ranges, `metadata`, and the tensors as views of the mapped file.

    Raises `ModelError` that names the file and what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise self._broken("it is shorter than a safetensors header")
                # Copy on write: tensors may share the memory without being able to change the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelError(f"it can't be read: {error.strerror}", where=str(self.path)) from error
        try:
            self._parse(size)
        except BaseException:
            self._map.close()
            raise

    def data(self, name: str) -> torch.Tensor:
        """The stored bytes: uint8 [num_bytes], a view."""
        start, stop = self._ranges[name]
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=stop - start, offset=self._data_start + start)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its dtype and shape, a view where its place in the file is aligned."""
        entry = self.entries[name]
        dtype = entry.torch_dtype
        if dtype is None:
            raise ModelError(f"torch has no dtype for {entry.dtype}", where=f"{self.path}, {name}")
        data = self.data(name)
        if data.data_ptr() % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(entry.shape)

    def prefetch(self, name: str) -> None:
        """Let the operating system read the tensor into its cache meanwhile, where it can."""
        start, stop = (self._data_start + place for place in self._ranges[name])
        if hasattr(mmap, "MADV_WILLNEED") and start < stop:
            start -= start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def close(self) -> None:
        """Unmap the file; views that are still held keep it mapped until they go."""
        with suppress(BufferError):
            self._map.close()

    def _parse(self, size: int) -> None:
        (length,) = struct.unpack("<Q", self._map[:8])
        if length > _MAX_HEADER_BYTES:
            raise self._broken(f"its header of {length:,} bytes is larger than the {_MAX_HEADER_BYTES:,} allowed")
        if length + 8 > size:
            raise self._broken(f"its header of {length:,} bytes is longer than the file: it was cut short")
        try:
            header = json.loads(self._map[8 : 8 + length].decode(), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._broken(f"its header is not valid ({error})") from error
        if not isinstance(header, dict):
            raise self._broken("its header is not a table of tensors")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self._broken("its __metadata__ is not a table of strings")
        if len(header) > _MAX_TENSORS:
            raise self._broken(f"{len(header):,} tensors are more than any model has")
        self.metadata: dict[str, str] = metadata
        self.entries: dict[str, TensorEntry] = {}
        self._ranges: dict[str, tuple[int, int]] = {}
        self._data_start = 8 + length
        for name, fields in header.items():
            self._add(name, fields)
        self._check_ranges(size)

    def _add(self, name: str, fields: Any) -> None:
        expected = {"dtype", "shape", "data_offsets"}
        if not isinstance(fields, dict) or set(fields) != expected:
            raise self._broken(f"{name!r} is not described by {', '.join(sorted(expected))}")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if dtype not in _DTYPES:
            raise self._broken(f"{name!r} has the unknown dtype {dtype!r}")
        if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
            raise self._broken(f"{name!r} has shape {shape!r} and offsets {offsets!r}")
        entry = TensorEntry(name, dtype, tuple(shape))
        if math.prod(shape) * _DTYPES[dtype][0] % 8 or offsets[1] - offsets[0] != entry.num_bytes:
            raise self._broken(f"{name!r}, {dtype} {shape}, does not fill bytes {offsets[0]:,} to {offsets[1]:,}")
        self.entries[name], self._ranges[name] = entry, (offsets[0], offsets[1])

    def _check_ranges(self, size: int) -> None:
        end = 0
        for name, (start, stop) in sorted(self._ranges.items(), key=lambda item: item[1]):
            if start != end:
                raise self._broken(f"{name!r} starts at byte {start:,} of the data and not at {end:,}")
            end = stop
        if self._data_start + end != size:
            raise self._broken(f"its tensors end at byte {self._data_start + end:,}, the file at {size:,}")

    def _broken(self, cause: str) -> ModelError:
        return ModelError(cause, where=str(self.path), fix="download or save it again")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is there twice")
    return table


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


class Checkpoint:
    """A folder with `model.safetensors`, or with an index and its shards.

    `entries` holds every tensor by name, `layout` the names in each file, in the order of the index's files.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX_FILE
        single = self.folder / SINGLE_FILE
        if single.is_file():
            files = {SINGLE_FILE: SafetensorsFile(single)}
            weight_map = dict.fromkeys(files[SINGLE_FILE].entries, SINGLE_FILE)
        elif index.is_file():
            weight_map = read_weight_map(index)
            files = {name: SafetensorsFile(self.folder / name) for name in sorted(set(weight_map.values()))}
        else:
            raise ModelError(f"it holds neither {SINGLE_FILE} nor {INDEX_FILE}", where=str(self.folder))
        for name, file in weight_map.items():
            if name not in files[file].entries:
                raise ModelError(f"{file} does not hold {name!r}, as the index says", where=str(index))
        self._file_of = {name: files[file] for name, file in weight_map.items()}
        self.entries: Mapping[str, TensorEntry] = {name: file.entries[name] for name, file in self._file_of.items()}
        self.layout = {
            name: [tensor for tensor in file.entries if weight_map.get(tensor) == name] for name, file in files.items()
        }
        unlisted = sum(len(file.entries) for file in files.values()) - len(weight_map)
        if unlisted:
            notice(f"fastllm: {unlisted} tensors in the files of {self.folder} are not in its index and are left out")

    def close(self) -> None:
        for file in self._file_of.values():
            file.close()

    def data(self, name: str) -> torch.Tensor:
        """The stored bytes: uint8 [num_bytes]."""
        return self._file_of[name].data(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored."""
        return self._file_of[name].tensor(name)

    def prefetch(self, name: str) -> None:
        """Let the operating system read a tensor that will be needed soon."""
        self._file_of[name].prefetch(name)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file of an index. Raises `ModelError` for one that is malformed or points out of its folder."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"it is not an index of weights ({error!r})", where=str(index)) from error
    for file in sorted({file for _, file in pairs}):
        if file != Path(file).name or "\\" in file or not file.endswith(".safetensors") or "\0" in file:
            raise ModelError(f"{file!r} is not the name of a safetensors file beside it", where=str(index))
    return dict(pairs)


class SafetensorsWriter:
    """An open file whose tensors are written in any order, each from its start to its end in blocks."""

    def __init__(self, file: AtomicFile, header: bytes, ranges: Mapping[str, tuple[int, int]]) -> None:
        self._file = file
        self._next = {name: len(header) + start for name, (start, _) in ranges.items()}
        self._end = {name: len(header) + stop for name, (_, stop) in ranges.items()}
        self.checksums = dict.fromkeys(ranges, 0)
        file.write_at(0, header)

    def write(self, name: str, block: torch.Tensor) -> int:
        """Append the values of `block`, of any dtype, to tensor `name`. Returns the number of bytes."""
        content = block.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data
        start = self._next[name]
        if start + len(content) > self._end[name]:
            raise ModelError(f"{len(content):,} bytes do not fit behind what is written", where=name)
        self._file.write_at(start, content)
        self._next[name] = start + len(content)
        self.checksums[name] = zlib.crc32(content, self.checksums[name])
        return len(content)

    def finish(self) -> None:
        """Raise `ModelError` where a tensor is not whole."""
        short = [name for name, end in self._end.items() if self._next[name] != end]
        if short:
            raise ModelError(f"{len(short)} tensors are not whole: {', '.join(short[:8])}", where=str(self._file.path))


@contextmanager
def safetensors_writer(path: Path, entries: Iterable[TensorEntry]) -> Iterator[SafetensorsWriter]:
    """A `SafetensorsWriter` for `path`, where the complete file appears when the block ends without an error.

    Raises `SaveError` where it can't be written.
    """
    # Widest dtypes first, so that every tensor starts at a multiple of its size.
    header, ranges = _encode_header(sorted(entries, key=lambda entry: -_DTYPES[entry.dtype][0]))
    with atomic_file(path, len(header) + max((stop for _, stop in ranges.values()), default=0)) as file:
        writer = SafetensorsWriter(file, header, ranges)
        yield writer
        writer.finish()


def _encode_header(entries: Iterable[TensorEntry]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(header, byte range of each tensor in the data behind it)."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires the format
    ranges: dict[str, tuple[int, int]] = {}
    at = 0
    for entry in entries:
        ranges[entry.name] = (at, at + entry.num_bytes)
        at += entry.num_bytes
        table[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": list(ranges[entry.name]),
        }  # fmt: skip
    encoded = json.dumps(table, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, ranges


def shard(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File -> names, for tensors of these bytes, in their order: at most `max_bytes` a file, a larger tensor alone in
    one, under the names of the hub."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def encode_index(files: Mapping[str, Iterable[TensorEntry]]) -> str:
    """The text of `model.safetensors.index.json` for these files."""
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    total = sum(entry.num_bytes for entries in files.values() for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def header_size(entries: Iterable[TensorEntry]) -> int:
    """Bytes before the data of a file of these tensors."""
    return len(_encode_header(entries)[0])


def parse_size(size: int | str, *, where: str = "max_shard_size") -> int:
    """Bytes of `5_000_000_000` or "5GB" (KB, MB, GB, TB, or with an i for powers of 1024)."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str):
        text = size.strip().upper()
        number = text.rstrip("KMGTIB").strip()
        unit = text[len(number) :].strip()
        units = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
        units |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
        if unit in units and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * units[unit])
    raise ArgumentError(f"got {size!r}", where=where, fix='use a number of bytes or a text such as "5GB"')

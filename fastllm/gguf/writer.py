"""Write a GGUF file whose tensors arrive one at a time and in any order.

All names, shapes and types are known beforehand, so every tensor has its place before the first one comes, and the
parts of a stacked tensor (the experts of a layer) can be placed as they come. The disk works on them meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from .atomic import AtomicFile, atomic_file
from .container import GGUFError, Metadata, TensorInfo, data_bytes, encode_header
from .reader import GGUFReader
from .write_behind import WriteBehind

_WAITING_BYTES = 2**29  # that may wait for the disk
_SYNC_BYTES = 2**28  # after which the disk is made to write: the last sync would otherwise have the whole file to write
_READERS = 8  # threads that read the file back


class GGUFWriter:
    """An open GGUF file: `write(name, bytes, first_row)` until every row of every tensor is there."""

    def __init__(self, file: AtomicFile, header: bytes, tensors: list[TensorInfo], behind: WriteBehind) -> None:
        self._file, self._data_offset, self._behind, self._unsynced = file, len(header), behind, 0
        self._tensors = {info.name: info for info in tensors}
        self._written: dict[str, list[tuple[int, int]]] = {info.name: [] for info in tensors}
        self._checksums: dict[tuple[str, int], tuple[int, int]] = {}
        file.write_at(0, header)

    def write(self, name: str, rows: torch.Tensor, first_row: int = 0) -> None:
        """Place encoded rows, uint8 [R, bytes of a row] on any device, of tensor `name` from row `first_row` on.

        They are written later: rows on the CPU may not change any more. Raises `GGUFError` for rows that do not fit or
        are there already, and what failed of earlier ones.
        """
        info = self._tensors[name]
        row_bytes = info.type.num_bytes(info.shape[-1:])
        total = info.num_bytes // row_bytes
        last_row = first_row + rows.shape[0]
        if rows.dtype != torch.uint8 or rows.shape[1:] != (row_bytes,) or last_row > total:
            raise GGUFError(f"{tuple(rows.shape)} bytes from row {first_row} do not fit {info.shape}", where=name)
        if any(first_row < end and start < last_row for start, end in self._written[name]):
            raise GGUFError(f"rows {first_row} to {last_row} arrive twice", where=name)
        content = rows.contiguous().cpu().numpy().data.cast("B")
        self._written[name].append((first_row, last_row))
        offset = self._data_offset + info.offset + first_row * row_bytes

        def store() -> None:
            self._file.write_at(offset, content)
            self._checksums[name, first_row] = (last_row, zlib.crc32(content))
            self._unsynced += len(content)
            if self._unsynced >= _SYNC_BYTES:
                self._file.sync()
                self._unsynced = 0

        self._behind.submit(len(content), store)

    def finish(self) -> None:
        """Pad the file and check that nothing is missing. Raises `GGUFError` that lists what is."""
        self._behind.wait()
        missing = []
        for name, info in self._tensors.items():
            rows = info.num_bytes // info.type.num_bytes(info.shape[-1:])
            if sum(end - start for start, end in self._written[name]) != rows:
                missing.append(name)
        if missing:
            shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            raise GGUFError(f"{len(missing)} of {len(self._tensors)} tensors are missing or not whole: {shown}")
        last = max(self._tensors.values(), key=lambda info: info.offset, default=None)
        if last is not None:
            end = last.offset + last.num_bytes
            padding = data_bytes(list(self._tensors.values())) - end
            self._file.write_at(self._data_offset + end, bytes(padding))

    def verify(self) -> None:
        """Read the file back as a stranger would: the table as planned, every byte as it was written."""
        with GGUFReader(self._file.path) as reader:
            if list(reader.tensors.values()) != list(self._tensors.values()):
                raise GGUFError("the tensor table read back is not the one written", where=str(self._file.path))
            with ThreadPoolExecutor(_READERS) as threads:
                list(threads.map(lambda place: self._check(reader, *place), self._checksums))

    def _check(self, reader: GGUFReader, name: str, first_row: int) -> None:
        last_row, checksum = self._checksums[name, first_row]
        if zlib.crc32(reader.data(name)[first_row:last_row].numpy().data.cast("B")) != checksum:
            raise GGUFError(
                "the bytes on the disk are not the bytes that were written",
                where=f"{self._file.path}, {name}",
                fix="check the disk, then run again",
            )


@contextlib.contextmanager
def gguf_writer(path: str | os.PathLike[str], metadata: Metadata, tensors: list[TensorInfo]) -> Iterator[GGUFWriter]:
    """A `GGUFWriter` for `path`. The file appears there when the block ends without an error, complete and checked.

    Raises `SaveError` where it can't be written, `GGUFError` where tensors are missing.
    """
    header = encode_header(metadata, tensors)
    with atomic_file(path, len(header) + data_bytes(tensors)) as file, WriteBehind(_WAITING_BYTES) as behind:
        writer = GGUFWriter(file, header, tensors, behind)
        yield writer
        writer.finish()
        file.sync()
        writer.verify()

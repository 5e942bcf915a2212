"""Activations in host memory: out on a side stream while the layers run, back ahead of need."""

from __future__ import annotations

import functools
import statistics
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .._locked_memory import locked_bytes

_ALIGNMENT = 512  # bytes; what copies of a tensor like to start at


@dataclass(slots=True, eq=False)
class _Slot:
    """One tensor on its way: `arrived` is set once its way back has started, to `value`, on the device, which is new
    memory unless it was set before."""

    host: torch.Tensor
    device: torch.device
    stream: torch.cuda.Stream
    value: torch.Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def arrive(self) -> torch.Tensor:
        assert self.value is not None and self.arrived is not None
        torch.cuda.current_stream(self.device).wait_event(self.arrived)
        value, self.value = self.value, None
        return value


def _start_back(slots: Sequence[_Slot]) -> None:
    """Start those on their way that are not."""
    slots = [slot for slot in slots if slot.arrived is None]
    for slot in slots:
        if slot.value is None:
            slot.value = torch.empty(slot.host.shape, dtype=slot.host.dtype, device=slot.device)
    if slots:
        stream = slots[0].stream
        stream.wait_stream(torch.cuda.current_stream(slots[0].device))
        with torch.cuda.stream(stream):
            for slot in slots:
                assert slot.value is not None
                slot.value.copy_(slot.host, non_blocking=True)
                slot.arrived = torch.cuda.Event()
                slot.arrived.record(stream)


@dataclass(eq=False)
class _Memory:
    """Locked host memory, used again from parcel to parcel.

    All copies of a device run on one stream: a piece may be given back, and taken again, while they are on their way.
    """

    stream: torch.cuda.Stream
    _free: list[torch.Tensor] = field(default_factory=list)

    def take(self, count: int) -> torch.Tensor:
        """uint8 of at least `count` bytes."""
        # Autograd's threads may give pieces back meanwhile: at the end, so that the places before it stay.
        sizes = [piece.numel() for piece in self._free]
        fitting = [index for index, size in enumerate(sizes) if size >= count]
        if fitting:
            return self._free.pop(min(fitting, key=sizes.__getitem__))
        if sizes:  # longer batches come: a short piece makes room for a long one
            self.stream.synchronize()
            del self._free[sizes.index(min(sizes))]
        piece = locked_bytes(count, for_forks=False)
        return torch.empty(count, dtype=torch.uint8, pin_memory=True) if piece is None else piece

    def give(self, piece: torch.Tensor) -> None:
        self._free.append(piece)

    @property
    def free_bytes(self) -> int:
        return sum(piece.numel() for piece in self._free)

    def release(self) -> None:
        self.stream.synchronize()
        self._free.clear()


@dataclass(eq=False)
class _Parcel:
    """What one layer sent away, in the order in which it will want it back."""

    slots: list[_Slot]
    piece: torch.Tensor
    memory: _Memory
    previous: _Parcel | None = None
    rows: weakref.ref[Rows] | None = None
    is_asked_for: bool = False

    def fetch(self, index: int) -> torch.Tensor:
        """One tensor, on its device. The first that is asked for starts all of them on their way, and after them what
        the layer before will want first: it is wanted at once, the rest while that layer computes. With the last, which
        is asked for when the layer's wide matrices are freed, rows of the layer before follow."""
        if not self.is_asked_for:
            self.is_asked_for = True
            _start_back(self.slots if self.previous is None else [*self.slots, self.previous.slots[0]])
        value = self.slots[index].arrive()
        if index == len(self.slots) - 1 and self.previous is not None and self.previous.rows is not None:
            rows = self.previous.rows()
            if rows is not None:
                rows.start()
        return value

    def __del__(self) -> None:
        for slot in self.slots:
            if slot.value is not None:  # nobody wanted it back, but its copy may still be under way
                slot.arrive()
        self.memory.give(self.piece)


class Rows:
    """The first rows of a matrix, away in host memory."""

    def __init__(self, parcel: _Parcel, like: torch.Tensor) -> None:
        self._parcel = parcel
        self._shape, self._dtype = like.shape, like.dtype
        self._buffer: torch.Tensor | None = None

    def start(self) -> torch.Tensor:
        """A new matrix that they are on their way to; the same each time."""
        if self._buffer is None:
            (slot,) = self._parcel.slots
            self._buffer = torch.empty(self._shape, dtype=self._dtype, device=slot.device)
            slot.value = self._buffer[: len(slot.host)]
            _start_back([slot])
        return self._buffer

    def arrive(self) -> None:
        """Wait for them, and let go of the matrix."""
        self._parcel.slots[0].arrive()
        self._buffer = None


class _Timed(NamedTuple):
    """The copies of one parcel to the host: when they started and were done, and when the next layer asked for that."""

    nbytes: int
    started: torch.cuda.Event
    copied: torch.cuda.Event
    asked: torch.cuda.Event


class LinkTimes(NamedTuple):
    """Of the layers of one forward, the median: bytes a second to the host, and seconds for which the link lay idle
    before the next layer sent something; negative where that waited for it."""

    rate: float
    idle: float


@dataclass(eq=False)
class HostOffload:
    """Where the layers of one model put what they keep in host memory, from the first to the last, and fetch it, from
    the last to the first.

    Device memory is taken and given back on the compute stream alone, which waits for the copies, so that it is free
    again in stream order: memory that a side stream is recorded on piles up while the host runs ahead.
    """

    _last: _Parcel | None = None
    _leaving: list[tuple[list[torch.Tensor], torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _memories: dict[torch.device, _Memory] = field(default_factory=dict)
    _memories_of_rows: dict[torch.device, _Memory] = field(default_factory=dict)  # pieces of another size
    _is_timed: bool = False
    _timed: list[_Timed] = field(default_factory=list)

    def __deepcopy__(self, memo: dict) -> HostOffload:
        return HostOffload()  # streams and parcels belong to one model's present step

    def begin(self, *, is_timed: bool = False) -> None:
        """A forward starts, of whose copies `times` tells afterwards if they are timed."""
        self._last = None
        self._leaving.clear()
        self._is_timed = is_timed
        if is_timed:
            self._timed.clear()

    def release(self) -> None:
        """Give back the host memory that no parcel is in."""
        self.begin()
        for memory in (*self._memories.values(), *self._memories_of_rows.values()):
            memory.release()

    @property
    def nbytes(self) -> int:
        """Host memory that parcels like the last ones find again; without that of rows."""
        return sum(memory.free_bytes for memory in self._memories.values())

    def put(self, tensors: Sequence[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
        """Start the copies of tensors of one device to the host. Returns what gives each back, on that device."""
        self.let_go()
        parcel = self._send(tensors, self._memory_of(tensors[0].device))
        parcel.previous, self._last = self._last, parcel
        return [functools.partial(self._fetch, parcel, index) for index in range(len(parcel.slots))]

    def put_rows(self, matrix: torch.Tensor, count: int) -> Rows:
        """Start the copy of the first rows of a contiguous matrix, after those of the latest `put`, whose layer goes
        on."""
        device = matrix.device
        memory = self._memories_of_rows.setdefault(device, _Memory(self._memory_of(device).stream))
        rows = Rows(self._send([matrix[:count]], memory), matrix)
        if self._last is not None:
            self._last.rows = weakref.ref(rows)
        return rows

    def times(self) -> LinkTimes | None:
        """Of the latest forward whose copies were timed, once they are done."""
        if not self._timed or not self._timed[-1].asked.query():
            return None
        rates = [1e3 * timed.nbytes / timed.started.elapsed_time(timed.copied) for timed in self._timed]
        idle = [1e-3 * timed.copied.elapsed_time(timed.asked) for timed in self._timed]
        return LinkTimes(statistics.median(rates), statistics.median(idle))

    def _memory_of(self, device: torch.device) -> _Memory:
        if device not in self._memories:
            self._memories[device] = _Memory(torch.cuda.Stream(device))
        return self._memories[device]

    def _send(self, tensors: Sequence[torch.Tensor], memory: _Memory) -> _Parcel:
        """Start the copies of tensors of one device to the host."""
        device = tensors[0].device
        leaving = [tensor.contiguous() for tensor in tensors]
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in leaving]
        piece, slots = memory.take(sum(sizes)), []
        memory.stream.wait_stream(torch.cuda.current_stream(device))
        started, copied = (torch.cuda.Event(enable_timing=self._is_timed) for _ in range(2))
        with torch.cuda.stream(memory.stream):
            started.record(memory.stream)
            for tensor, place in zip(leaving, piece[: sum(sizes)].split(sizes), strict=True):
                host = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                slots.append(_Slot(host.copy_(tensor, non_blocking=True), device, memory.stream))
            copied.record(memory.stream)
        self._leaving.append((leaving, started, copied))
        return _Parcel(slots, piece, memory)

    def turn(self) -> None:
        """The layers from here on stay: nothing else leaves, and what will be wanted first starts on its way back."""
        self.let_go()
        if self._last is not None:
            _start_back(self._last.slots[:1])

    def let_go(self) -> None:
        """Drop the tensors whose copies were started since the layer before; the device waits until they are done."""
        for leaving, started, copied in self._leaving:
            stream = torch.cuda.current_stream(leaving[0].device)
            if self._is_timed:
                asked = torch.cuda.Event(enable_timing=True)
                asked.record(stream)
                self._timed.append(_Timed(sum(tensor.nbytes for tensor in leaving), started, copied, asked))
            stream.wait_event(copied)
        self._leaving.clear()

    def _fetch(self, parcel: _Parcel, index: int) -> torch.Tensor:
        self.let_go()
        return parcel.fetch(index)

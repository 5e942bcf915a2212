"""Activations in host memory: out on a side stream while the layers run, back ahead of need."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .._locked_memory import locked_bytes

_ALIGNMENT = 512  # bytes; what copies of a tensor like to start at


@dataclass(slots=True, eq=False)
class _Slot:
    """One tensor on its way: `arrived` is set, with `value` on the device, once its way back has started."""

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

    def release(self) -> None:
        self.stream.synchronize()
        self._free.clear()


@dataclass(eq=False)
class _Parcel:
    """What one layer sent away, in the order in which it will want it back."""

    slots: list[_Slot]
    piece: torch.Tensor
    memory: _Memory
    previous: _Parcel | None
    is_asked_for: bool = False

    def fetch(self, index: int) -> torch.Tensor:
        """One tensor, on its device. The first that is asked for starts all of them on their way, and after them what
        the layer before will want first: it is wanted at once, the rest while that layer computes."""
        if not self.is_asked_for:
            self.is_asked_for = True
            _start_back(self.slots if self.previous is None else [*self.slots, self.previous.slots[0]])
        return self.slots[index].arrive()

    def __del__(self) -> None:
        for slot in self.slots:
            if slot.value is not None:  # nobody wanted it back, but its copy may still be under way
                slot.arrive()
        self.memory.give(self.piece)


@dataclass(eq=False)
class HostOffload:
    """Where the layers of one model put what they keep in host memory, from the first to the last, and fetch it, from
    the last to the first.

    Device memory is taken and given back on the compute stream alone, which waits for the copies, so that it is free
    again in stream order: memory that a side stream is recorded on piles up while the host runs ahead.
    """

    _last: _Parcel | None = None
    _leaving: tuple[list[torch.Tensor], torch.cuda.Event] | None = None
    _memories: dict[torch.device, _Memory] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> HostOffload:
        return HostOffload()  # streams and parcels belong to one model's present step

    def begin(self) -> None:
        """A forward starts."""
        self._last = self._leaving = None

    def release(self) -> None:
        """Give back the host memory that no parcel is in."""
        self.begin()
        for memory in self._memories.values():
            memory.release()

    def put(self, tensors: Sequence[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
        """Start the copies of tensors of one device to the host. Returns what gives each back, on that device."""
        device = tensors[0].device
        if device not in self._memories:
            self._memories[device] = _Memory(torch.cuda.Stream(device))
        memory = self._memories[device]
        self.let_go()
        leaving = [tensor.contiguous() for tensor in tensors]
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in leaving]
        piece, slots = memory.take(sum(sizes)), []
        memory.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(memory.stream):
            for tensor, place in zip(leaving, piece[: sum(sizes)].split(sizes), strict=True):
                host = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                slots.append(_Slot(host.copy_(tensor, non_blocking=True), device, memory.stream))
            copied = torch.cuda.Event()
            copied.record(memory.stream)
        self._leaving = (leaving, copied)
        parcel = self._last = _Parcel(slots, piece, memory, self._last)
        return [functools.partial(self._fetch, parcel, index) for index in range(len(slots))]

    def turn(self) -> None:
        """The layers from here on stay: nothing else leaves, and what will be wanted first starts on its way back."""
        self.let_go()
        if self._last is not None:
            _start_back(self._last.slots[:1])

    def let_go(self) -> None:
        """Drop the tensors whose copies were started last; the device waits until they are done."""
        if self._leaving is not None:
            leaving, copied = self._leaving
            torch.cuda.current_stream(leaving[0].device).wait_event(copied)
            self._leaving = None

    def _fetch(self, parcel: _Parcel, index: int) -> torch.Tensor:
        self.let_go()
        return parcel.fetch(index)

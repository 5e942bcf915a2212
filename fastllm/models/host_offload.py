"""Activations in pinned host memory: out on a side stream while the layers run, back ahead of need."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True, eq=False)
class _Slot:
    """One tensor on its way: `arrived` is set, with `value` on the device, once its way back has started."""

    host: torch.Tensor
    device: torch.device
    stream: torch.cuda.Stream
    value: torch.Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def start_back(self) -> None:
        if self.arrived is not None:
            return
        self.value = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.value.copy_(self.host, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(self.stream)

    def arrive(self) -> torch.Tensor:
        assert self.value is not None and self.arrived is not None
        torch.cuda.current_stream(self.device).wait_event(self.arrived)
        value, self.value = self.value, None
        return value


@dataclass(slots=True, eq=False)
class _Parcel:
    """What one layer sent away, in the order in which it will want it back."""

    slots: list[_Slot]
    previous: _Parcel | None
    is_asked_for: bool = False

    def fetch(self, index: int) -> torch.Tensor:
        """One tensor, on its device. The first that is asked for starts all of them on their way, and after them what
        the layer before will want first: it is wanted at once, the rest while that layer computes."""
        if not self.is_asked_for:
            self.is_asked_for = True
            for slot in self.slots:
                slot.start_back()
            if self.previous is not None:
                self.previous.slots[0].start_back()
        return self.slots[index].arrive()


@dataclass(eq=False)
class HostOffload:
    """Where the layers of one model put what they keep in host memory, from the first to the last, and fetch it, from
    the last to the first.

    Device memory is taken and given back on the compute stream alone, which waits for the copies, so that it is free
    again in stream order: memory that a side stream is recorded on piles up while the host runs ahead.
    """

    _last: _Parcel | None = None
    _leaving: tuple[list[torch.Tensor], torch.cuda.Event] | None = None
    _streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> HostOffload:
        return HostOffload()  # streams and parcels belong to one model's present step

    def begin(self) -> None:
        """A forward starts."""
        self._last = self._leaving = None

    def put(self, tensors: Sequence[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
        """Start the copies of tensors of one device to the host. Returns what gives each back, on that device."""
        device = tensors[0].device
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        self.let_go()
        leaving, slots = [tensor.contiguous() for tensor in tensors], []
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for tensor in leaving:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                slots.append(_Slot(host.copy_(tensor, non_blocking=True), device, stream))
            copied = torch.cuda.Event()
            copied.record(stream)
        self._leaving = (leaving, copied)
        parcel = self._last = _Parcel(slots, self._last)
        return [functools.partial(self._fetch, parcel, index) for index in range(len(slots))]

    def let_go(self) -> None:
        """Drop the tensors whose copies were started last; the device waits until they are done."""
        if self._leaving is not None:
            leaving, copied = self._leaving
            torch.cuda.current_stream(leaving[0].device).wait_event(copied)
            self._leaving = None

    def _fetch(self, parcel: _Parcel, index: int) -> torch.Tensor:
        self.let_go()
        return parcel.fetch(index)

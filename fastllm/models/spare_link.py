"""How many rows of gate and up's output go to host memory beside the attention halves: as many as the link to the host
has time for while the layers run. Rows that come back are not computed again.

How much time that is depends on the machine, the model and the batch, and shows in the first steps: copies of the
second forward are timed, when nothing is compiled or allocated any more.
"""

from __future__ import annotations

import torch

from .._device import free_host_bytes
from .._notices import notice
from .host_offload import HostOffload

# Part of the link's idle time that is used: a copy that is late holds up every layer, one that is missing costs little.
_USED = 0.85
# Rows are counted in these: tiles of matrix products, which fewer rows would leave half empty.
_ROWS = 128


class SpareLink:
    """The share of rows of one model, which is found once."""

    def __init__(self) -> None:
        self._share: float | None = None
        self._forwards = 0
        self._timed_rows = 0

    def begin(
        self, offload: HostOffload, *, sends: bool, layers: int, rows: int, row_bytes: int, host_share: float
    ) -> None:
        """A forward of so many rows starts on `offload`. `sends`: its layers send their attention halves to the host;
        `row_bytes` is what gate and up give for a row, `host_share` the part of the free host memory to take."""
        if not sends or self._share is not None:
            offload.begin()
            return
        times = offload.times() if self._timed_rows else None
        if times is not None:
            room = host_share * free_host_bytes() / layers
            spare = min(_USED * times.idle * times.rate, room)
            self._share = min(1.0, max(0.0, spare / (self._timed_rows * row_bytes)))
            if self.rows(rows):
                more = layers * self.rows(rows) * row_bytes / 2**30
                notice(
                    f"fastllm: the link to the host has time for {self._share:.0%} of what gate and up give: about "
                    f"{more:.1f} GiB more wait in host memory for {rows:,} tokens",
                    once="spare link",
                )
        self._forwards += 1
        is_timed = self._share is None and self._forwards > 1
        offload.begin(is_timed=is_timed)
        if is_timed:
            self._timed_rows = rows

    def rows(self, count: int) -> int:
        """How many of `count` rows of a layer go to the host; of a longer batch than the timed one not more, for whose
        rows the host has room. In deterministic mode none: products of fewer rows may round otherwise."""
        if self._share is None or torch.are_deterministic_algorithms_enabled():
            return 0
        return int(self._share * min(count, self._timed_rows)) // _ROWS * _ROWS

"""Documents packed into rows of tokens: where each begins and ends, which keeps attention inside it.

    query i of a row sees key j of it  where  max(start(i), i - window + 1) <= j <= i          (causal)
                                       where  start(i) <= j < end(i)                           (not causal)

Shapes: cu_seqlens [N + 1], offsets into the B * S tokens of a batch, row after row; starts and ends [B, S], counted
within the row; a dense mask [B, 1, S, S].
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one batch. `max_seqlen` is a number of the host, so that no kernel has to wait for it."""

    cu_seqlens: torch.Tensor
    max_seqlen: int
    batch: int
    length: int

    @classmethod
    def from_position_ids(cls, position_ids: torch.Tensor, batch: int) -> Documents | None:
        """Documents begin where positions `[B or 1, S]` do not count up by one. None where each row is one document.

        Waits for the device once, to learn how many documents there are.
        """
        begins = torch.ones(position_ids.shape, dtype=torch.bool)
        begins[:, 1:] = (position_ids.diff(dim=-1) != 1).cpu()
        begins = begins.expand(batch, -1)
        if not begins[:, 1:].any():
            return None
        offsets = begins.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([offsets, torch.tensor([begins.numel()])]).to(torch.int32)
        longest = int(cu_seqlens.diff().max())
        return cls(cu_seqlens.to(position_ids.device), longest, batch, begins.shape[1])

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor) -> Documents:
        """The documents of one row, from their offsets `[N + 1]`: the last is the row's length. Waits for the device
        once, to learn them."""
        offsets = cu_seqlens.tolist()
        longest = max(end - start for start, end in itertools.pairwise(offsets))
        return cls(cu_seqlens.to(torch.int32), longest, 1, offsets[-1])

    @classmethod
    def whole_rows(cls, batch: int, length: int, device: torch.device) -> Documents:
        """Each row is one document."""
        offsets = torch.arange(0, batch * length + 1, max(length, 1), dtype=torch.int32, device=device)
        return cls(offsets, length, batch, length)

    @property
    def is_packed(self) -> bool:
        """Whether some row holds more than one document; none reaches from one row into the next."""
        return self.cu_seqlens.numel() - 1 > self.batch

    @functools.cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(starts, ends) int32 [B, S]: of each token's document, the first position and the one after the last."""
        cu_seqlens = self.cu_seqlens
        tokens = torch.arange(self.batch * self.length, dtype=torch.int32, device=cu_seqlens.device)
        index = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
        row_offsets = (tokens // self.length * self.length).to(torch.int32)
        starts, ends = (cu_seqlens[index + i] - row_offsets for i in (0, 1))
        return starts.view(self.batch, self.length), ends.view(self.batch, self.length)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document. Waits for the device."""
        return self.cu_seqlens.diff().tolist()

    def mask(self, window: int = 0, *, causal: bool = True) -> torch.Tensor:
        """What each query sees, as a dense bool mask; made once for each case. For kernels with no better way."""
        if (window, causal) not in self._masks:
            positions = torch.arange(self.length, dtype=torch.int32, device=self.cu_seqlens.device)
            first, end = self.bounds
            if window:
                first = torch.maximum(first, positions - (window - 1))
            if causal:
                end = (positions + 1).expand_as(end)
            seen = (positions < end[..., None]) & (positions >= first[..., None])
            self._masks[window, causal] = seen[:, None]
        return self._masks[window, causal]

    def on(self, device: torch.device) -> Documents:
        """The same documents with their tensors on `device`, copied there once."""
        if device == self.cu_seqlens.device:
            return self
        if device not in self._copies:
            self._copies[device] = Documents(self.cu_seqlens.to(device), self.max_seqlen, self.batch, self.length)
        return self._copies[device]

    @functools.cached_property
    def _masks(self) -> dict[tuple[int, bool], torch.Tensor]:
        return {}

    @functools.cached_property
    def _copies(self) -> dict[torch.device, Documents]:
        return {}

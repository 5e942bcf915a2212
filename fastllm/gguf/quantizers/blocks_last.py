"""Quantizers that search work on [.., N] tensors with the N blocks last; stored bytes are [N, ..] with them first."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .base import Quantizer
from .search import Samples


class BlocksLastQuantizer(Quantizer):
    """Blocks of `num_sub` sub-blocks; a subclass gives the bytes of all blocks as [n, N] pieces, in their order."""

    num_sub: int

    def _encode(self, rows: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        samples = Samples.of(rows, importance, self.num_sub, self.type.block_size // self.num_sub)
        return torch.cat(self._encode_samples(samples)).t().contiguous()

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        weights = self._decode_bytes(blocks.t().contiguous())
        return weights.reshape(self.type.block_size, -1).t().contiguous()

    @abstractmethod
    def _encode_samples(self, samples: Samples) -> list[torch.Tensor]:
        """The stored bytes, uint8 [n, N] each."""

    @abstractmethod
    def _decode_bytes(self, data: torch.Tensor) -> torch.Tensor:
        """Weights fp32 [S, B, N] of stored bytes uint8 [block bytes, N]."""


def f16_bytes(values: torch.Tensor) -> torch.Tensor:
    """uint8 [2, N] of N fp32 values."""
    return values.half().view(-1, 1).view(torch.uint8).t()


def f16_values(data: torch.Tensor) -> torch.Tensor:
    """fp32 [1, 1, N] of uint8 [2, N]."""
    return data.t().contiguous().view(torch.float16).float().view(1, 1, -1)

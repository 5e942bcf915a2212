"""Codes of a few bits in bytes: `pack` lays the slices of one dimension over each other, `unpack` takes them apart."""

import torch


def pack(codes: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """OR of `codes.select(dim, p) << (p * bits)` over p; uint8, one dimension less."""
    parts = codes.unbind(dim)
    packed = parts[0]
    for place, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (place * bits))
    return packed


def unpack(data: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """The inverse of `pack` for bytes that are full: 8 / bits slices along a new `dim`."""
    mask = (1 << bits) - 1
    return torch.stack([(data >> place) & mask for place in range(0, 8, bits)], dim)

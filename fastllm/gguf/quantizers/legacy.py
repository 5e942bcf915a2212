"""Blocks of 32 weights with one scale, as in the first versions of ggml.

    type   bytes                             weight
    Q8_0   d | q[32] int8                    d * q
    Q4_0   d | qs[16]                        d * (q - 8)
    Q4_1   d | m | qs[16]                    d * q + m
    Q5_0   d | qh[4] | qs[16]                d * (q - 16)
    Q5_1   d | m | qh[4] | qs[16]            d * q + m

d and m are f16. Byte i of `qs` has the low four bits of q[i] in its low half and those of q[i + 16] in its high half;
bit i of `qh`, as a little-endian u32, is the fifth bit of q[i].

Without importance the scale comes from the extremes of the block and the bytes are those of llama.cpp, to which these
types owe their speed and their reputation for exact reproduction. With it the scale is searched (search.py).
"""

from __future__ import annotations

import torch

from ..tensor_types import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from .base import Quantizer, read_f16
from .bits import pack, unpack
from .grids import IntegerGrid
from .search import Samples, search_affine_block, search_signed_block

_BELOW_HALF = 0.49999997  # the fp32 before 0.5: adding it and truncating rounds halves away from zero, and only them


def _f16_bytes(values: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 2] of fp32 [N, 1]."""
    return values.half().view(torch.uint8)


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 16] of codes uint8 [N, 32], their low four bits."""
    return pack((codes & 15).view(-1, 2, 16), 1, 4)


def _unpack_nibbles(data: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, 32] of uint8 [N, 16]."""
    return unpack(data, 1, 4).view(-1, 32)


def _extremes(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)


def _signed_peak(blocks: torch.Tensor) -> torch.Tensor:
    """The weight of largest magnitude [N, 1]; of x and -x the one that comes first."""
    low, high = _extremes(blocks)
    peak = torch.where(high > -low, high, low)
    tied = (high == -low).view(-1).nonzero().view(-1)
    if tied.numel():
        first = blocks[tied].abs().argmax(1, keepdim=True)
        peak[tied] = blocks[tied].gather(1, first)
    return peak + 0.0  # -0 to 0


class Q8_0Quantizer(Quantizer):
    """Ignores importance: at eight bits the extremes decide."""

    type = Q8_0

    def _encode(self, rows: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        blocks = rows.reshape(-1, 32)
        low, high = _extremes(blocks)
        d = torch.maximum(high, -low).abs_().div_(127)
        q = blocks * torch.where(d > 0, 1 / d, 0)
        data = torch.empty(blocks.shape[0], 34, dtype=torch.int8, device=rows.device)
        data[:, :2] = _f16_bytes(d).view(torch.int8)
        data[:, 2:] = q + torch.copysign(torch.full_like(q, _BELOW_HALF), q)
        return data.view(torch.uint8)

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        return read_f16(blocks[:, :2]) * blocks[:, 2:].view(torch.int8)


class _Signed(Quantizer):
    """d * (q - offset): the peak of the block maps to the low end of the grid."""

    offset: int

    def _encode(self, rows: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        if importance is None:
            blocks = rows.reshape(-1, 32)
            d = _signed_peak(blocks) / -self.offset
            q = (blocks * torch.where(d != 0, 1 / d, 0)).add_(self.offset + 0.5)
            codes = q.to(torch.int8).clamp_max_(2 * self.offset - 1).view(torch.uint8)
        else:
            grid = IntegerGrid(-self.offset, self.offset - 1)
            scale, values = search_signed_block(Samples.of(rows, importance, 1, 32), grid)
            d, codes = scale.view(-1, 1), grid.codes(values[0]).t().contiguous()
        return self._packed(_f16_bytes(d), codes)

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        return read_f16(blocks[:, :2]) * (self._unpacked(blocks[:, 2:]).float() - self.offset)

    def _packed(self, scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return torch.cat((scales, _pack_nibbles(codes)), 1)

    def _unpacked(self, data: torch.Tensor) -> torch.Tensor:
        return _unpack_nibbles(data)


class _Affine(Quantizer):
    """d * q + m: the range of the block maps to 0..levels."""

    levels: int

    def _encode(self, rows: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        if importance is None:
            blocks = rows.reshape(-1, 32)
            m, high = _extremes(blocks)
            d = (high - m) / self.levels
            q = (blocks - m).mul_(torch.where(d != 0, 1 / d, 0)).add_(0.5)
            codes = q.to(torch.int8).clamp_max_(self.levels).view(torch.uint8)
        else:
            scale, minimum, values = search_affine_block(Samples.of(rows, importance, 1, 32), self.levels)
            d, m = scale.view(-1, 1), -minimum.view(-1, 1)
            codes = values[0].to(torch.uint8).t().contiguous()
        return self._packed(torch.cat((_f16_bytes(d), _f16_bytes(m)), 1), codes)

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        d, m = read_f16(blocks[:, :4]).split(1, 1)
        return d * self._unpacked(blocks[:, 4:]).float() + m

    def _packed(self, scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return torch.cat((scales, _pack_nibbles(codes)), 1)

    def _unpacked(self, data: torch.Tensor) -> torch.Tensor:
        return _unpack_nibbles(data)


class _FiveBits:
    """Codes of five bits: the fifth ones apart, before the others."""

    def _packed(self, scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        fifth_bits = pack((codes >> 4).view(-1, 4, 8), 2, 1)
        return torch.cat((scales, fifth_bits, _pack_nibbles(codes)), 1)

    def _unpacked(self, data: torch.Tensor) -> torch.Tensor:
        return _unpack_nibbles(data[:, 4:]) | (unpack(data[:, :4], 2, 1).view(-1, 32) << 4)


class Q4_0Quantizer(_Signed):
    type, offset = Q4_0, 8


class Q5_0Quantizer(_FiveBits, _Signed):
    type, offset = Q5_0, 16


class Q4_1Quantizer(_Affine):
    type, levels = Q4_1, 15


class Q5_1Quantizer(_FiveBits, _Affine):
    type, levels = Q5_1, 31

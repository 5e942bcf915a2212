"""Super-blocks of 256 weights with a scale and a minimum per sub-block: weight = d * k * q - dmin * j.

    type   sub-blocks   q      k, j   bytes
    Q2_K   16 of 16     0..3   0..15  scales[16] | qs[64] | d | dmin
    Q4_K   8 of 32      0..15  0..63  d | dmin | scales[12] | qs[128]
    Q5_K   8 of 32      0..31  0..63  d | dmin | scales[12] | qh[32] | qs[128]

d and dmin are f16. The layouts are those of ggml-quants; the search is search_affine_super.
"""

from __future__ import annotations

import torch

from ..tensor_types import Q2_K, Q4_K, Q5_K
from .bits import pack, unpack
from .blocks_last import BlocksLastQuantizer, f16_bytes, f16_values
from .search import Samples, search_affine_super


class Q2_KQuantizer(BlocksLastQuantizer):
    """Byte s of `scales` is k | j << 4; byte 32 h + l of `qs` has weights l, l + 32, l + 64, l + 96 of half h."""

    type, num_sub = Q2_K, 16

    def _encode_samples(self, samples: Samples) -> list[torch.Tensor]:
        d, dmin, k, j, q = search_affine_super(samples, levels=3, steps=15)
        scales = pack(torch.stack((k, j)).to(torch.uint8), 0, 4)
        qs = pack(q.to(torch.uint8).view(2, 4, 32, -1), 1, 2)
        return [scales.flatten(0, 1), qs.flatten(0, 1), f16_bytes(d), f16_bytes(dmin)]

    def _decode_bytes(self, data: torch.Tensor) -> torch.Tensor:
        scales, qs, d, dmin = data.split((16, 64, 2, 2))
        k, j = unpack(scales, 0, 4).float().unsqueeze(2)
        q = unpack(qs.view(2, 32, -1), 1, 2).reshape(16, 16, -1)
        return f16_values(d) * k * q - f16_values(dmin) * j


def _pack_scales(k: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """uint8 [12, N] of six-bit k and j, [8, N] each: the high bits of the last four lie above the first four."""
    return torch.cat(
        (
            k[:4] | (k[4:] >> 4 << 6),
            j[:4] | (j[4:] >> 4 << 6),
            (k[4:] & 15) | (j[4:] << 4),
        )
    )


def _unpack_scales(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (k, j), [8, 1, N] each, of uint8 [12, N]."""
    first_k, first_j, last = data.split(4)
    k = torch.cat((first_k & 63, (last & 15) | (first_k >> 6 << 4)))
    j = torch.cat((first_j & 63, (last >> 4) | (first_j >> 6 << 4)))
    return k.float().unsqueeze(1), j.float().unsqueeze(1)


class Q4_KQuantizer(BlocksLastQuantizer):
    """Byte 32 c + l of `qs` has weights 64 c + l (low half) and 64 c + 32 + l."""

    type, num_sub = Q4_K, 8
    levels = 15

    def _encode_samples(self, samples: Samples) -> list[torch.Tensor]:
        d, dmin, k, j, q = search_affine_super(samples, levels=self.levels, steps=63)
        scales = _pack_scales(k.squeeze(1).to(torch.uint8), j.squeeze(1).to(torch.uint8))
        return [f16_bytes(d), f16_bytes(dmin), scales, *self._pack_codes(q.to(torch.uint8))]

    def _decode_bytes(self, data: torch.Tensor) -> torch.Tensor:
        k, j = _unpack_scales(data[4:16])
        return f16_values(data[:2]) * k * self._unpack_codes(data[16:]) - f16_values(data[2:4]) * j

    def _pack_codes(self, q: torch.Tensor) -> list[torch.Tensor]:
        return [pack((q & 15).view(4, 2, 32, -1), 1, 4).flatten(0, 1)]

    def _unpack_codes(self, data: torch.Tensor) -> torch.Tensor:
        return unpack(data.view(4, 32, -1), 1, 4).reshape(8, 32, -1)


class Q5_KQuantizer(Q4_KQuantizer):
    """As Q4_K; bit s of byte l of `qh` is the fifth bit of weight l of sub-block s."""

    type = Q5_K
    levels = 31

    def _pack_codes(self, q: torch.Tensor) -> list[torch.Tensor]:
        return [pack(q >> 4, 0, 1), *super()._pack_codes(q)]

    def _unpack_codes(self, data: torch.Tensor) -> torch.Tensor:
        return super()._unpack_codes(data[32:]) | (unpack(data[:32], 0, 1) << 4)

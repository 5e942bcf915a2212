"""Super-blocks of 256 weights with a signed scale per sub-block of 16: weight = d * k * q.

    type   q          k           bytes
    Q3_K   -4..3      -32..31     hmask[32] | qs[64] | scales[12] | d
    Q6_K   -32..31    -128..127   ql[128] | qh[64] | scales[16] int8 | d

d is f16; q and Q3_K's k are stored with their lowest value as 0. The layouts are those of ggml-quants; the search is
search_signed_super.
"""

from __future__ import annotations

import torch

from ..tensor_types import Q3_K, Q6_K
from .bits import pack, unpack
from .blocks_last import BlocksLastQuantizer, f16_bytes, f16_values
from .grids import IntegerGrid
from .search import Samples, search_signed_super


class Q3_KQuantizer(BlocksLastQuantizer):
    """Codes have their low two bits in `qs` (byte 32 h + l: weights l, l + 32, l + 64, l + 96 of half h) and the third
    in `hmask` (bit s of byte l: weight 32 s + l). Scales have their low four bits in bytes 0 to 7 (j and j + 8), the
    high two in bytes 8 to 11 (j, j + 4, j + 8, j + 12)."""

    type, num_sub = Q3_K, 16

    def _encode_samples(self, samples: Samples) -> list[torch.Tensor]:
        grid = IntegerGrid(-4, 3)
        d, k, values = search_signed_super(samples, grid, -32, 31)
        codes = grid.codes(values)
        scales = (k.squeeze(1) + 32).to(torch.uint8)
        return [
            pack((codes >> 2).view(8, 32, -1), 0, 1),
            pack((codes & 3).view(2, 4, 32, -1), 1, 2).flatten(0, 1),
            pack((scales & 15).view(2, 8, -1), 0, 4),
            pack((scales >> 4).view(4, 4, -1), 0, 2),
            f16_bytes(d),
        ]

    def _decode_bytes(self, data: torch.Tensor) -> torch.Tensor:
        hmask, qs, low, high, d = data.split((32, 64, 8, 4, 2))
        codes = unpack(qs.view(2, 32, -1), 1, 2).reshape(16, 16, -1)
        codes = codes | (unpack(hmask, 0, 1).reshape(16, 16, -1) << 2)
        k = unpack(low, 0, 4).reshape(16, 1, -1) | (unpack(high, 0, 2).reshape(16, 1, -1) << 4)
        return f16_values(d) * (k.float() - 32) * (codes.float() - 4)


class Q6_KQuantizer(BlocksLastQuantizer):
    """Codes have their low four bits in `ql` (byte 64 h + l: weights l and l + 64 of half h) and the high two in `qh`
    (byte 32 h + l: weights l, l + 32, l + 64, l + 96 of half h)."""

    type, num_sub = Q6_K, 16

    def _encode_samples(self, samples: Samples) -> list[torch.Tensor]:
        grid = IntegerGrid(-32, 31)
        d, k, values = search_signed_super(samples, grid, -128, 127)
        codes = grid.codes(values)
        return [
            pack((codes & 15).view(2, 2, 64, -1), 1, 4).flatten(0, 1),
            pack((codes >> 4).view(2, 4, 32, -1), 1, 2).flatten(0, 1),
            k.squeeze(1).to(torch.int8).view(torch.uint8),
            f16_bytes(d),
        ]

    def _decode_bytes(self, data: torch.Tensor) -> torch.Tensor:
        ql, qh, scales, d = data.split((128, 64, 16, 2))
        codes = unpack(ql.view(2, 64, -1), 1, 4).reshape(16, 16, -1)
        codes = codes | (unpack(qh.view(2, 32, -1), 1, 2).reshape(16, 16, -1) << 4)
        return f16_values(d) * scales.view(torch.int8).float().unsqueeze(1) * (codes.float() - 32)

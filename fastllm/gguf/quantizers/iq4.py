"""Four-bit codes into a table of 16 uneven values, denser about zero as weights are.

    type     blocks          bytes                                        weight
    IQ4_NL   32              d | qs[16]                                   d * table[q]
    IQ4_XS   256: 8 of 32    d | scales_h u16 | scales_l[4] | qs[128]     d * (k - 32) * table[q]

d is f16, k has six bits: the low four in `scales_l` (two to a byte), the high two in `scales_h`. Byte i of the 16 of a
sub-block has weights i and i + 16. Table and layouts: ggml-common.h.
"""

from __future__ import annotations

import torch

from ..tensor_types import IQ4_NL, IQ4_XS
from .bits import pack, unpack
from .blocks_last import BlocksLastQuantizer, f16_bytes, f16_values
from .grids import CodebookGrid
from .search import Samples, search_signed_block, search_signed_super

_GRID = CodebookGrid((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


class IQ4_NLQuantizer(BlocksLastQuantizer):
    type, num_sub = IQ4_NL, 1

    def _encode_samples(self, samples: Samples) -> list[torch.Tensor]:
        d, values = search_signed_block(samples, _GRID)
        return [f16_bytes(d), pack(_GRID.codes(values).view(2, 16, -1), 0, 4)]

    def _decode_bytes(self, data: torch.Tensor) -> torch.Tensor:
        return f16_values(data[:2]) * _GRID.decode(unpack(data[2:], 0, 4)).view(1, 32, -1)


class IQ4_XSQuantizer(BlocksLastQuantizer):
    type, num_sub = IQ4_XS, 8

    def _encode_samples(self, samples: Samples) -> list[torch.Tensor]:
        d, k, values = search_signed_super(samples, _GRID, -32, 31)
        scales = (k.squeeze(1) + 32).to(torch.uint8)
        return [
            f16_bytes(d),
            pack((scales >> 4).view(2, 4, -1), 1, 2),
            pack((scales & 15).view(4, 2, -1), 1, 4),
            pack(_GRID.codes(values).view(8, 2, 16, -1), 1, 4).flatten(0, 1),
        ]

    def _decode_bytes(self, data: torch.Tensor) -> torch.Tensor:
        d, high, low, qs = data.split((2, 2, 4, 128))
        k = unpack(low, 1, 4).reshape(8, 1, -1) | (unpack(high, 1, 2).reshape(8, 1, -1) << 4)
        values = _GRID.decode(unpack(qs.view(8, 16, -1), 1, 4)).view(8, 32, -1)
        return f16_values(d) * (k.float() - 32) * values

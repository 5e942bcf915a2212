"""F32, F16 and BF16: one weight after the other, rounded to nearest even."""

import torch

from ..tensor_types import BF16, F16, F32
from .base import Quantizer


class _Plain(Quantizer):
    dtype: torch.dtype

    def _encode(self, rows: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        return rows.to(self.dtype).contiguous().view(torch.uint8)

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks.contiguous().view(self.dtype).float()


class F32Quantizer(_Plain):
    type, dtype = F32, torch.float32
    largest_weight = torch.finfo(torch.float32).max


class F16Quantizer(_Plain):
    type, dtype = F16, torch.float16


class BF16Quantizer(_Plain):
    type, dtype = BF16, torch.bfloat16
    largest_weight = torch.finfo(torch.bfloat16).max

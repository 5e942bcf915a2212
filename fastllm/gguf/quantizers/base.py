"""What all quantizers share: rows in, bytes out, a chunk at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..container import GGUFError
from ..tensor_types import TensorType

# Weights worked on at once: enough to hide what a call costs, few enough for the cache or the memory.
_CPU_CHUNK, _ACCELERATOR_CHUNK = 2**18, 2**24
LARGEST_F16 = 65504.0


class Quantizer(ABC):
    """Encoder and decoder of one tensor type.

    Shapes: rows [R, C] with C a multiple of the block size; importance [C], the mean square of the input that meets
    each column (an imatrix); data [R, bytes of a row].
    Dtypes: rows any float dtype; arithmetic in fp32; data uint8. Everything stays on the device of the rows.
    """

    type: ClassVar[TensorType]
    # Weights beyond it have no finite scale; such a model is broken anyway.
    largest_weight: ClassVar[float] = LARGEST_F16

    def encode(
        self, rows: torch.Tensor, importance: torch.Tensor | None = None, *, factor: float = 1.0
    ) -> torch.Tensor:
        """The stored bytes of `rows` times `factor`, with the least squared error found, each column weighted by its
        importance.

        Raises `GGUFError` for weights that are not finite or larger than the type can hold.
        """
        num_rows, width = rows.shape
        importance = _normalised(importance, rows)
        encoded = torch.empty(num_rows, self.type.num_bytes((width,)), dtype=torch.uint8, device=rows.device)
        chunk = _CPU_CHUNK if rows.device.type == "cpu" else _ACCELERATOR_CHUNK
        rows_per_chunk = max(1, chunk // width)
        for start in range(0, num_rows, rows_per_chunk):
            part = rows[start : start + rows_per_chunk].float()
            part = part if factor == 1.0 else part * factor
            self._require_in_range(part)
            encoded[start : start + rows_per_chunk] = self._encode(part, importance).view(part.shape[0], -1)
        return encoded

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        """The weights [R, C] in fp32 that the stored bytes stand for."""
        blocks = data.reshape(-1, self.type.block_bytes)
        return self._decode(blocks).view(*data.shape[:-1], -1)

    @abstractmethod
    def _encode(self, rows: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """Bytes of a chunk of fp32 rows, in the order of the rows."""

    @abstractmethod
    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """Weights fp32 [N, block size] of blocks uint8 [N, block bytes]."""

    def _require_in_range(self, rows: torch.Tensor) -> None:
        largest = float(torch.stack(torch.aminmax(rows)).abs().max())
        if not largest <= self.largest_weight:  # also true of NaN
            raise GGUFError(
                f"a weight is {largest:g}, {self.type.name} holds finite ones up to {self.largest_weight:g}",
                fix="find out where training diverged; for a healthy model with large weights take bf16 or f32",
            )


def _normalised(importance: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Importance with mean 1, or None where it says nothing: absent, all zero (an expert that no token met)."""
    if importance is None:
        return None
    if importance.shape != rows.shape[1:]:
        raise GGUFError(f"importance of shape {tuple(importance.shape)} for rows of {rows.shape[1]} weights")
    importance = importance.to(rows.device, torch.float32)
    mean = float(importance.mean())
    if not (mean >= 0 and mean < float("inf")) or float(importance.min()) < 0:
        raise GGUFError("the importance of a column is negative or not finite")
    # Columns that calibration never lit still count a little, or their weights would be arbitrary.
    return (importance / mean).clamp_min(1e-6) if mean > 0 else None


def read_f16(data: torch.Tensor) -> torch.Tensor:
    """fp32 [N, n] of n little-endian halves in uint8 [N, 2 n]."""
    return data.contiguous().view(torch.float16).float()

"""Which decoder layers of a model keep their dequantised weights from pass to pass, within what the planner allows."""

from __future__ import annotations

import torch

from .._notices import notice
from ..kernels.kept_weights import KeptWeights


class WeightKeeper:
    """The kept weights of one model: of its last layers, of as many as fit beside the longest batch seen."""

    def __init__(self, count: int) -> None:
        self.num_layers = self._count = count
        self._device: torch.device | None = None
        self._layers: dict[int, KeptWeights] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(kept.nbytes for kept in self._layers.values())

    def allow(self, spare_bytes: float, layer_bytes: int, device: torch.device, reason: str) -> None:
        """Keep the weights of as many layers as `spare_bytes` has room for, never of more than before: weights that
        came and went with the length of a batch would only fragment the memory."""
        fitting = max(0, int(spare_bytes // layer_bytes)) if layer_bytes else 0
        self.num_layers, self._device = min(self.num_layers, fitting), device
        first = self._count - self.num_layers
        self._free([index for index in self._layers if index < first], reason)

    def of_layer(self, index: int, device: torch.device) -> KeptWeights | None:
        """Where layer `index` keeps its weights; None where it does not, or is on another device than the planned."""
        if index < self._count - self.num_layers or device != self._device:
            return None
        return self._layers.setdefault(index, KeptWeights())

    def release(self, reason: str) -> None:
        """Free everything; layers that train again begin anew."""
        self._free(list(self._layers), reason)

    def _free(self, indices: list[int], reason: str) -> None:
        freed = [self._layers.pop(index) for index in indices]
        held = sum(kept.nbytes for kept in freed)
        for kept in freed:
            kept.close()
        if held:
            notice(
                f"fastllm: the dequantised weights of {len(freed)} layers ({held / 2**30:.1f} GiB) are freed: {reason}",
                once=f"freed weights:{reason}",
            )

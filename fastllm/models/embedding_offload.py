"""An embedding in host memory: it holds one row in some hundred thousand that a step reads, and no arithmetic.

NVIDIA GPUs read its rows themselves. For other devices they are read on the host and sent to where the tokens came
from, which waits for the device once in a forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._notices import notice
from ..kernels.host_rows import host_table, is_readable, read_rows
from .model_methods import TRAINED_IN_FULL


class _InHostMemory(nn.Embedding):
    """Put below the class of one embedding. Moving the model to a device leaves the weight in host memory."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        is_trained = self.weight.requires_grad and torch.is_grad_enabled()
        if is_readable(self.weight, input.device) and self.max_norm is None and not is_trained:
            return read_rows(self.weight, input)
        rows = super().forward(input.to(self.weight.device))
        return rows.to(input.device, non_blocking=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is not self.weight:
                return fn(tensor)
            dtype = fn(tensor.new_empty(0)).dtype  # to find this out the table itself goes nowhere
            return tensor if dtype == tensor.dtype else host_table(tensor.to(dtype))

        return super()._apply(moved, recurse)


def offload_embedding(model: Any) -> None:
    """Move the input embedding of a loaded model to host memory, or say why it stays."""
    embedding = model.get_input_embeddings()
    reason = _reason_to_stay(model, embedding)
    if reason is not None:
        notice(f"fastllm: offload_embedding=True is left out: {reason}")
        return
    freed = embedding.weight.nbytes
    device = embedding.weight.device
    embedding.weight.data = host_table(embedding.weight)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else the process would go on holding it
    kind = type(embedding)
    bases = (_InHostMemory,) if kind is nn.Embedding else (kind, _InHostMemory)
    embedding.__class__ = type(kind.__name__, bases, {"__module__": __name__})
    notice(f"fastllm: the embedding is in host memory, which frees {freed / 2**30:.2f} GiB of the GPU's")


def is_offloaded(embedding: nn.Module) -> bool:
    return isinstance(embedding, _InHostMemory)


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: the device of its first parameter that is not an offloaded embedding's."""
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    offloaded = embedding.weight if is_offloaded(embedding) else None
    return next(p.device for p in model.parameters() if p is not offloaded)


def _reason_to_stay(model: Any, embedding: Any) -> str | None:
    head = model.get_output_embeddings()
    if embedding.weight.requires_grad and getattr(model, TRAINED_IN_FULL, False):
        return "it is trained"
    if head is not None and head.weight is embedding.weight:
        return "it is the head too, which computes with all of it"
    if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
        return "the model is spread over several devices"
    if embedding.weight.device.type == "cpu":
        return "the model is in host memory already"
    return None

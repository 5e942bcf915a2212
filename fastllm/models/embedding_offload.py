"""An embedding in host memory: it holds one row in some hundred thousand that a step reads, and no arithmetic.

Its rows are read on the host and sent to where the tokens came from, which waits for the device once in a forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._notices import notice
from .model_methods import TRAINED_IN_FULL


class _InHostMemory:
    """Mixed into the class of one embedding. Moving the model to a device leaves the weight in host memory."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        rows = super().forward(input.to(self.weight.device))  # pyright: ignore[reportAttributeAccessIssue]
        return rows.to(input.device, non_blocking=True)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: fn(tensor).to("cpu"), recurse)  # pyright: ignore[reportAttributeAccessIssue]


def offload_embedding(model: Any) -> None:
    """Move the input embedding of a loaded model to host memory, or say why it stays."""
    embedding = model.get_input_embeddings()
    reason = _reason_to_stay(model, embedding)
    if reason is not None:
        notice(f"fastllm: offload_embedding=True is left out: {reason}")
        return
    freed = embedding.weight.numel() * embedding.weight.element_size()
    device = embedding.weight.device
    embedding.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else the process would go on holding it
    embedding.__class__ = type(type(embedding).__name__, (_InHostMemory, type(embedding)), {"__module__": __name__})
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

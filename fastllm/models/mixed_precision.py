"""16-bit models with fp32 inside: embeddings, heads and biases trained in full, or a residual stream beyond fp16.

Their products meet tensors of two dtypes, which only autocast reconciles. Trainers switch it on; outside of them, for
`generate` or an evaluation of one's own, the model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_DTYPE = "_fastllm_autocast_dtype"
# Attribute of the class of an embedding that starts an fp32 residual stream although its weights are fp16.
WIDENS = "_fastllm_widens_fp16"


def hold_in_fp32(model: Any, trained: Mapping[str, torch.nn.Parameter]) -> None:
    """Turn the trained 16-bit parameters to fp32, and remember on `model` which dtype the rest computes in.

    Adapters need no autocast: they are cast to the dtype of their input wherever they are used.
    """
    for name, parameter in trained.items():
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            continue
        if "lora_" not in name:
            setattr(model, _DTYPE, parameter.dtype)
        parameter.data = parameter.data.float()


def mixed_precision(model: Any) -> AbstractContextManager:
    """Autocast to the dtype of the 16-bit parts of `model`, where it has fp32 parts and autocast is off."""
    dtype = getattr(model, _DTYPE, None)
    if dtype is None and widens(model):
        dtype = torch.float16
    if dtype is None or torch.is_autocast_enabled(model.device.type):
        return nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


def widens(model: Any) -> bool:
    """Whether the residual stream of `model` is fp32 although its weights are fp16."""
    embedding = model.get_input_embeddings()
    return getattr(type(embedding), WIDENS, False) and embedding.weight.dtype == torch.float16

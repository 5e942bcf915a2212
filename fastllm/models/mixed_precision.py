"""16-bit models that hold trained parts in fp32, as embeddings, heads and biases trained in full are.

Their products meet tensors of two dtypes, which only autocast reconciles. Trainers switch it on; outside of them, for
`generate` or an evaluation of one's own, the model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_DTYPE = "_fastllm_autocast_dtype"


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
    if dtype is None or torch.is_autocast_enabled(model.device.type):
        return nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)

"""FP8 products in the decoder layers: where they can be asked for, what they reach, and what is told of them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._device import Device
from .._errors import ArgumentError, DeviceError, UnsupportedError
from .._notices import notice
from ..kernels.fp8 import CAPABILITY
from ..kernels.fp8_head import head_obstacle
from ..kernels.projections import ProjectionGroup, fp8_obstacle
from .arch import get_arch
from .lora_view import FP8_COMPUTE, FP8_GRADIENT, forget_groups


def check_fp8_compute(
    value: Any, model_type: str, device: Device, dtype: torch.dtype, *, bits: int, full_finetuning: bool, patch: bool
) -> bool:
    """The value of a `fp8_compute` argument, checked against the machine and the rest of the request.

    Raises:
        ArgumentError: it is not a bool, or contradicts another argument.
        UnsupportedError: the architecture has no fast classes.
        DeviceError: the device has no FP8 products.
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"got {value!r}", where="fp8_compute", fix="fp8_compute=True or False")
    if not value:
        return False
    contradiction = {
        "full_finetuning=True trains the weights, and only frozen ones are multiplied in FP8": full_finetuning,
        "load_in_8bit=True has int8 products of its own": bits == 8,
        "patch=False leaves every product to transformers": not patch,
    }
    for reason, applies in contradiction.items():
        if applies:
            raise ArgumentError(reason, where="fp8_compute", fix="leave one of the two out")
    if get_arch(model_type) is None:
        raise UnsupportedError(
            f"{model_type!r} has no fast classes, which carry FP8 products",
            where="fp8_compute",
            fix="leave fp8_compute out",
        )
    if device.kind == "cpu":
        notice(
            "fastllm: fp8_compute on a CPU is emulated: the results of a GPU, without its speed", once="fp8 on a CPU"
        )
        return True
    if device.kind != "cuda" or device.capability < CAPABILITY or sys.platform == "win32":
        raise DeviceError(
            f"{device.name} has no row-wise scaled FP8 products in torch: those need an NVIDIA GPU of compute "
            f"capability {CAPABILITY[0]}.{CAPABILITY[1]} (Ada, Hopper, Blackwell) on Linux",
            where="fp8_compute",
            fix="leave fp8_compute out",
        )
    if dtype is not torch.bfloat16:
        raise ArgumentError(
            f"the results of FP8 products are bf16, the model computes in {str(dtype).removeprefix('torch.')}",
            where="fp8_compute",
            fix="dtype=torch.bfloat16",
        )
    return True


def use_fp8(model: nn.Module, layers: Sequence[Any]) -> None:
    """Let the frozen weights of these decoder layers be multiplied in FP8, and the gradient of the head's input be made
    so."""
    setattr(model, FP8_GRADIENT, True)
    for layer in layers:
        for owner in (layer.self_attn, layer.mlp):
            setattr(owner, FP8_COMPUTE, True)
    forget_groups(model)


def fp8_note(groups_of_layers: Sequence[Sequence[ProjectionGroup]], head: ProjectionGroup | str) -> str:
    """Which layers multiply in FP8, whether the gradient through the head is made so, and why others do not: the groups
    of each layer that asks for it, and that of the head or why it has none."""
    if not groups_of_layers:
        return ""
    complete = sum(all(group.is_fp8 for group in groups) for groups in groups_of_layers)
    line = f"frozen weights of {complete} of {len(groups_of_layers)} layers are multiplied in FP8"
    reasons = Counter(
        fp8_obstacle(group.projections) for groups in groups_of_layers for group in groups if not group.is_fp8
    )
    notes = [line, *(f"{count} products are not: {reason}" for reason, count in reasons.items())]
    obstacle = head if isinstance(head, str) else head_obstacle(head)
    if obstacle is None:
        notes.append("the gradient of long batches through the head is made in FP8, too")
    else:
        notes.append(f"the gradient through the head is not: {obstacle}")
    return "; ".join(notes)

"""What the machine can do: asked once per device, then read."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Device:
    """One compute device.

    `kind` is `cuda`, `rocm`, `xpu`, `mps` or `cpu`; `capability` is CUDA's (major, minor), else (0, 0);
    `has_bf16` says that bf16 arithmetic is native there, `has_tensor_core_dot` that Triton's `tl.dot` uses matrix
    units.
    """

    kind: str
    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    has_bf16: bool
    has_tensor_core_dot: bool

    @property
    def torch_name(self) -> str:
        """The name that torch gives the device: ROCm's is `cuda`."""
        kind = "cuda" if self.kind == "rocm" else self.kind
        return kind if kind in ("cpu", "mps") else f"{kind}:{self.index}"


def _host_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 0


@functools.cache
def device_info(kind: str, index: int = 0) -> Device:
    """Facts of one device, by torch's name for its kind (`cuda`, `xpu`, `mps`, `cpu`)."""
    import torch

    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        is_rocm = torch.version.hip is not None
        capability = torch.cuda.get_device_capability(index)
        return Device(
            kind="rocm" if is_rocm else "cuda",
            index=index,
            name=properties.name,
            capability=capability,
            total_bytes=properties.total_memory,
            # torch reports bf16 as supported on Turing and Volta, where it is emulated and slow.
            has_bf16=is_rocm or capability >= (8, 0),
            has_tensor_core_dot=is_rocm or capability >= (8, 0),
        )
    if kind == "xpu":
        properties = torch.xpu.get_device_properties(index)
        return Device("xpu", index, properties.name, (0, 0), properties.total_memory, True, True)
    if kind == "mps":
        return Device("mps", 0, "Apple GPU", (0, 0), torch.mps.recommended_max_memory(), True, False)
    return Device("cpu", 0, "CPU", (0, 0), _host_bytes(), True, False)


def info_of(device: torch.device) -> Device:
    """Facts of the device of a tensor."""
    import torch

    index = device.index
    if index is None and device.type == "cuda":
        index = torch.cuda.current_device()
    return device_info(device.type, index or 0)


def default_device() -> Device:
    """The device that a model is loaded on when nobody says otherwise: this process's accelerator, else the CPU."""
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0") or 0)
    if torch.cuda.is_available():
        return device_info("cuda", local_rank % torch.cuda.device_count())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return device_info("xpu", local_rank % torch.xpu.device_count())
    if torch.backends.mps.is_available():
        return device_info("mps")
    return device_info("cpu")


# FLOP/s that 16-bit matrix products reach on one multiprocessor, by major compute capability.
_PRODUCT_RATES = {7: 0.8e12, 8: 1.6e12, 9: 5e12, 10: 9e12, 12: 1.6e12}


def product_rate(device: torch.device) -> float:
    """FLOP/s that 16-bit matrix products reach on an NVIDIA GPU, roughly; no bound for anything else."""
    import torch

    if device.type != "cuda":
        return float("inf")
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * _PRODUCT_RATES.get(properties.major, 1e12)


def free_bytes(device: torch.device) -> int:
    """Bytes that an allocation on `device` can still take, the caching allocator's unused blocks included.

    A limit set with `torch.cuda.set_per_process_memory_fraction` counts.
    """
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device.index) * total) - reserved
        return max(0, min(free, allowed)) + reserved - torch.cuda.memory_allocated(device)
    if device.type == "xpu":
        free, _ = torch.xpu.mem_get_info(device)
        return free
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0


def is_bf16_supported() -> bool:
    """Whether training on this machine takes bf16: false on a T4, which takes fp16, and on a CPU, which takes fp32.

    It is what notebooks give trainers as `bf16=is_bf16_supported(), fp16=not is_bf16_supported()`.
    """
    device = default_device()
    return device.has_bf16 and device.kind != "cpu"


is_bfloat16_supported = is_bf16_supported

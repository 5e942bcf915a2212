"""What the machine can do: asked once per device, then read."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
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


# Bytes a second between host and GPU, one way, by major compute capability: PCIe 3 and 4, and 5 for what is newer.
_LINK_RATES = {7: 11e9, 8: 22e9}


def host_link_rate(device: torch.device) -> float:
    """Bytes a second that copies from pinned memory to an NVIDIA GPU reach, or back, roughly."""
    import torch

    return _LINK_RATES.get(torch.cuda.get_device_properties(device).major, 50e9)


def free_host_bytes() -> int:
    """Bytes of host memory that this process can still take, as one of those on this machine that train together.

    The limit of a container counts; zero where the system does not say.
    """
    free = [_named_number(_MEMINFO, "MemAvailable:", 1024), *map(_room_of_group, _CONTROL_GROUPS)]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return min((value for value in free if value is not None), default=0) // processes


_MEMINFO = Path("/proc/meminfo")
# What limits a container's memory, in control groups of version 2 and 1: folder; files of limit and use; and in
# memory.stat the names of the file cache that the use counts, and that is given up when memory runs short.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)  # fmt: skip


def _room_of_group(group: tuple[str, str, str, tuple[str, ...]]) -> int | None:
    folder, limit_file, use_file, caches = group
    try:
        limit, use = ((Path(folder) / file).read_text(encoding="ascii").strip() for file in (limit_file, use_file))
    except OSError:
        return None
    if limit == "max":
        return None
    cached = sum(_named_number(Path(folder) / "memory.stat", name, 1) or 0 for name in caches)
    return max(0, int(limit) - int(use) + cached)


def _named_number(file: Path, name: str, unit: int) -> int | None:
    """The number behind `name` at the start of a line, times `unit`; None where there is no such line."""
    try:
        lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
        return next((int(words[1]) * unit for words in lines if words[0] == name), None)
    except OSError:
        return None


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

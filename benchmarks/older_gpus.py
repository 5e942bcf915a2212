"""A GPU held to the limits of an older one, for its memory figures: speed says nothing there."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class OlderGpu:
    """`capability` is CUDA's (major, minor); `memory_gib` what a process can take of it."""

    capability: tuple[int, int]
    memory_gib: float


# What Colab's T4 reports of itself.
OLDER_GPUS = {"t4": OlderGpu((7, 5), 14.741)}


def take_at_most(gib: float) -> None:
    """Let this process take so much of the GPU's memory, or what there is."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def hold_to(name: str) -> None:
    """Let fastllm see the GPU as one called so: its memory, and its compute capability, by which it has no bf16 and no
    tensor cores for Triton. Of torch's attention only the memory-efficient kernel is left.

    Kernels are still those for the GPU that is there.
    """
    import torch

    from fastllm import _device

    gpu, seen = OLDER_GPUS[name], _device.device_info
    take_at_most(gpu.memory_gib)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)

    def device_info(kind: str, index: int = 0) -> _device.Device:
        limits = {"capability": gpu.capability, "total_bytes": int(gpu.memory_gib * 2**30)}
        return replace(seen(kind, index), **limits, has_bf16=False, has_tensor_core_dot=False)

    _device.device_info = device_info

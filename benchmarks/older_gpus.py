"""A GPU held to the limits of an older one, for its memory figures: speed says nothing there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OlderGpu:
    """`capability` is CUDA's (major, minor); `memory_gib` what a process can take of it."""

    capability: tuple[int, int]
    memory_gib: float


# What Colab's T4 reports of itself.
OLDER_GPUS = {"t4": OlderGpu((7, 5), 14.741)}


def hold_to(name: str) -> None:
    """Let this process see the GPU as one called so: its memory, its compute capability and with that no bf16 and no
    tensor cores for Triton, and of torch's attention only the memory-efficient kernel.

    Nothing may have asked for the GPU's abilities before. cuBLAS still runs its kernels for the GPU that is there.
    """
    import torch

    gpu = OLDER_GPUS[name]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gpu.memory_gib * 2**30 / total)
    torch.cuda.get_device_capability = lambda device=None: gpu.capability
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)

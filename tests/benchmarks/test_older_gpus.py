"""A GPU held to the limits of an older one is that to fastllm."""

from types import SimpleNamespace

import torch

from benchmarks.older_gpus import OLDER_GPUS, hold_to
from fastllm import _device
from fastllm._device import Device, info_of


def test_fastllm_sees_the_older_gpu(monkeypatch):
    hopper = Device("cuda", 0, "NVIDIA H100", (9, 0), 80 * 2**30, True, True)
    fractions, kernels = [], {}
    monkeypatch.setattr(_device, "device_info", lambda kind, index=0: hopper)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=hopper.total_bytes)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_flash_sdp", lambda on: kernels.update(flash=on))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: kernels.update(cudnn=on))
    hold_to("t4")
    seen = _device.device_info("cuda", 0)
    assert info_of(torch.device("cuda:0")).capability == (7, 5) == OLDER_GPUS["t4"].capability
    assert not seen.has_bf16 and not seen.has_tensor_core_dot and seen.name == hopper.name
    assert fractions == [14.741 / 80] and seen.total_bytes == int(14.741 * 2**30)
    assert kernels == {"flash": False, "cudnn": False}

"""Fixtures of the kernel tests: every implementation in every dtype, and memory that betrays what nobody wrote."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastllm import _device
from fastllm.kernels import projections

from .parity import Setting

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _runs(implementation: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter truncates where a GPU rounds to bf16, so bf16 kernels are tested on GPUs."""
    return implementation == "reference" or dtype != torch.bfloat16 or torch.cuda.is_available()


SETTINGS = {
    f"{implementation}-{name}": (implementation, dtype)
    for implementation in ("reference", "triton")
    for name, dtype in DTYPES.items()
    if _runs(implementation, dtype)
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def setting(request: pytest.FixtureRequest, device: torch.device) -> Setting:
    """Each implementation in each dtype that it can run in here."""
    return Setting(*request.param, device)


@pytest.fixture(params=["reference", "triton"])
def fp32(request: pytest.FixtureRequest, device: torch.device) -> Setting:
    """Each implementation in fp32, for properties that do not depend on the dtype."""
    return Setting(request.param, torch.float32, device)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the kernels package allocates without writing to it is NaN (integers: the largest one)."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("fastllm.kernels"):
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def narrow_extension(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Spares Triton's interpreter the padding rows of A, most of its time where LoRA is not the point."""
    if device.type == "cpu":
        monkeypatch.setattr(projections, "EXTENSION_MULTIPLE", 8)


def see_capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    """Let fastllm take every device for an NVIDIA GPU of this compute capability."""
    seen = SimpleNamespace(capability=(major, minor), has_tensor_core_dot=(major, minor) >= (8, 0))
    monkeypatch.setattr(_device, "device_info", lambda kind, index=0: seen)

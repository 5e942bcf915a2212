"""Shared set-up: Triton runs in its interpreter where there is no GPU, nothing reaches a model hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any fastllm import

import pytest

# fp32 tests compare all of fp32's bits; cuDNN's convolutions would drop thirteen of them.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU where there is one, else CPU tensors through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _long_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for batches of many rows run for the few of a test, too."""
    monkeypatch.setattr("fastllm.kernels.decoder_glu._LEAST_ROWS", 0)


@pytest.fixture(autouse=True)
def _every_notice_is_new() -> None:
    """What fastllm tells once a process, it tells once a test."""
    from fastllm._notices import forget_notices

    forget_notices()

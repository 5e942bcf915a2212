"""Host memory that a GPU copies from and to on its own, and that its kernels can read.

torch's own allocator of such memory rounds every size up to a power of two, and takes most of a second a GiB.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch


class _LockedPages(mmap.mmap):
    """Pages that stay where they are, mapped into the GPU's address space, until nobody holds them."""

    _address: int | None = None

    def lock(self, address: int) -> bool:
        if int(_runtime().cudaHostRegister(address, len(self), 0)) != 0:
            return False
        self._address = address
        return True

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._address is not None and not is_finalizing():  # when modules are gone, so are the pages
            _runtime().cudaHostUnregister(self._address)


def locked_bytes(count: int) -> torch.Tensor | None:
    """uint8 `[count]`, locked for NVIDIA GPUs; None where there are none, or the system does not allow it.

    Nothing may be on its way from or to it when it is dropped.
    """
    if not count or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    pages = _LockedPages(-1, count)  # shared with processes that are forked: private pages would be copied for each
    memory = torch.frombuffer(pages, dtype=torch.uint8).zero_()  # all threads together bring the pages in
    return memory if pages.lock(memory.data_ptr()) else None


def _runtime() -> Any:
    return torch.cuda.cudart()

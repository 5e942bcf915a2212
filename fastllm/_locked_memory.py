"""Host memory that a GPU copies from and to on its own, and that its kernels can read.

torch's own allocator of such memory rounds every size up to a power of two, and takes most of a second a GiB.
"""

from __future__ import annotations

import contextlib
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


def locked_bytes(count: int, *, for_forks: bool = True) -> torch.Tensor | None:
    """uint8 `[count]`, locked for NVIDIA GPUs; None where there are none, or the system does not allow it.

    Processes that are forked can read it too, unless it is not `for_forks`, which takes a fifth of the time. Nothing
    may be on its way from or to it when it is dropped.
    """
    if not count or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    pages = _new_pages(count, for_forks=for_forks)
    memory = torch.frombuffer(pages, dtype=torch.uint8).zero_()  # all threads together bring the pages in
    return memory if pages.lock(memory.data_ptr()) else None


def _new_pages(count: int, *, for_forks: bool) -> _LockedPages:
    if for_forks or not hasattr(mmap, "MADV_DONTFORK"):
        return _LockedPages(-1, count)  # shared: private pages would be copied for each process
    pages = _LockedPages(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # After a fork private pages are copied when they are written to, and a GPU would go on with the old ones.
    pages.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _runtime() -> Any:
    return torch.cuda.cudart()

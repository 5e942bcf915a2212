"""Make the k-th operation that touches the disk fail, or kill the process there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from fastllm.gguf import atomic

OPERATIONS = ("pwrite", "fsync", "replace", "ftruncate", "unlink")


def interrupt_at(monkeypatch, k: int, action: Callable[[], None]) -> list[int]:
    """Let `action` happen before the k-th operation. Returns the counter of operations, a list of one number."""
    count = [0]
    for name in OPERATIONS:
        original = getattr(os, name)

        def interrupted(*args, _original=original, **options):
            count[0] += 1
            if count[0] == k:
                action()
            return _original(*args, **options)

        monkeypatch.setattr(atomic.os, name, interrupted)
    return count


def fail_with(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def killed_at(monkeypatch, k: int, run: Callable[[], object]) -> bool:
    """Run `run` in a child process that is killed (SIGKILL) before its k-th operation. Returns whether it was."""
    child = os.fork()
    if child == 0:
        interrupt_at(monkeypatch, k, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)

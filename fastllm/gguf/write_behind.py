"""Writing beside computing: the disk works on one tensor while the next ones are quantized."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class WriteBehind:
    """Jobs that run one after the other, in their order, on a thread of their own.

    A context manager. Leaving it waits for the job that runs and drops those that have not begun: `wait` first.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` that unfinished jobs may hold together; one job alone may hold more."""
        self._max_bytes, self._held = max_bytes, 0
        self._unfinished: deque[tuple[int, Future[None]]] = deque()
        self._thread = ThreadPoolExecutor(1, "fastllm-write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self._thread.shutdown(cancel_futures=True)

    def submit(self, num_bytes: int, job: Callable[[], None]) -> None:
        """Run `job`, which holds `num_bytes`, after all earlier ones; wait where too much is held.

        Raises what an earlier job raised.
        """
        while self._unfinished and (self._unfinished[0][1].done() or self._held + num_bytes > self._max_bytes):
            self._finish_first()
        self._unfinished.append((num_bytes, self._thread.submit(job)))
        self._held += num_bytes

    def wait(self) -> None:
        """Return when all jobs are done. Raises what the first one that failed raised."""
        while self._unfinished:
            self._finish_first()

    def _finish_first(self) -> None:
        num_bytes, future = self._unfinished.popleft()
        self._held -= num_bytes
        future.result()

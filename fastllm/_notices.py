"""What fastllm tells the user: each adaptation, fallback and ignored request once, from the main process only."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("fastllm")
_told: set[str] = set()


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0) == 0


class _StdoutHandler(logging.StreamHandler):
    """Writes to whatever `sys.stdout` is at that moment: notebooks and test runners exchange it."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def _ensure_visible() -> None:
    """Print plain lines unless somebody has configured the `fastllm` logger."""
    if logger.handlers or logger.level != logging.NOTSET:
        return
    logger.addHandler(_StdoutHandler())
    logger.propagate = False
    logger.setLevel(logging.INFO)


def notice(message: str, *, once: str | None = None, level: int = logging.INFO) -> None:
    """Tell the user `message`. With `once`, only the first call of that key speaks."""
    if once is not None:
        if once in _told:
            return
        _told.add(once)
    if _is_main_process():
        _ensure_visible()
        logger.log(level, "%s", message)


def warn(message: str, *, once: str | None = None) -> None:
    """`notice` for something that the user probably wants to change."""
    notice(f"fastllm warning: {message}", once=once, level=logging.WARNING)


def forget_notices() -> None:
    """Let every `once` key speak again."""
    _told.clear()

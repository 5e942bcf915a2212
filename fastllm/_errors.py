"""Errors that say where, why, and which line fixes it.

Each class is also a built-in exception, so code that catches `ValueError`, `TypeError` or `NotImplementedError` keeps
working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastllmError(Exception):
    """Base of every error that fastllm raises on purpose.

    `cause` says what is wrong, `where` names the place (an argument, a module, a data row, a file) and `fix` is what to
    do about it, as a line that can be pasted where possible.
    """

    def __init__(self, cause: str, *, where: str = "", fix: str = "") -> None:
        self.cause, self.where, self.fix = cause, where, fix
        super().__init__(f"{where + ': ' if where else ''}{cause}{chr(10) + '  fix: ' + fix if fix else ''}")


class ArgumentError(FastllmError, TypeError, ValueError):
    """An argument that does not exist, has the wrong type, or contradicts another one."""


class UnsupportedError(FastllmError, NotImplementedError):
    """A request that this version does not serve."""


class ModelError(FastllmError, ValueError):
    """A checkpoint or model that can't be loaded, adapted or trained as asked."""


class TokenizerError(FastllmError, ValueError):
    """A tokenizer that does not fit the model, or lacks a token that training needs."""


class DataError(FastllmError, ValueError):
    """A data set or row that can't be trained on."""


class DeviceError(FastllmError, RuntimeError):
    """A request that the machine's accelerator can't serve."""


class MissingPackageError(FastllmError, ImportError):
    """An optional package that the request needs and that is not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the entry of `known` closest to `name`, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {match[0]!r}?" if match else ""


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ArgumentError` that lists each name of `given` which is not in `known`, with the nearest known name."""
    known = list(known)
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    described = "; ".join(f"{name!r} {hint}".rstrip() for name in unknown for hint in [nearest(name, known)])
    raise ArgumentError(
        f"unknown argument {described}", where=where, fix=f"known arguments: {', '.join(sorted(known))}"
    )

"""Planted bugs: the package with one piece of its source replaced, for the length of one test.

A suite is worth what it notices. Each planted bug is a mistake that somebody could make in the real source; a check of
the suite has to raise on it, and to pass without it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest


@dataclass(frozen=True)
class Bug:
    """In a module's source, `wrong` stands where `right` is; `check` is what must notice."""

    right: str
    wrong: str
    check: Callable[..., None]


def plant(module_name: str, bug: Bug, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the module's functions, methods and kernels run the wrong source until `monkeypatch` is undone.

    Functions get the other code, so that every name that refers to them sees the bug; Triton kernels are exchanged in
    every module of the package that has them.
    """
    module = importlib.import_module(module_name)
    planted = _imported_copy(module, bug, monkeypatch, folder)
    sound = dict(_functions_of(module))
    for name, function in _functions_of(planted):
        if function.__code__ != sound[name].__code__:
            monkeypatch.setattr(sound[name], "__code__", function.__code__)
    for name, value in vars(planted).items():
        if _is_kernel(value):
            for user in _users_of(getattr(module, name), module):
                monkeypatch.setattr(user, name, value)


def _imported_copy(module: ModuleType, bug: Bug, monkeypatch: pytest.MonkeyPatch, folder: Path) -> ModuleType:
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    found = source.count(bug.right)
    assert found == 1, f"{module.__file__} has {bug.right!r} {found} times: plant this bug where that code is now"
    name = f"{module.__name__}_planted"
    path = folder / f"{name}.py"
    path.write_text(source.replace(bug.right, bug.wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, planted)
    spec.loader.exec_module(planted)
    return planted


def _functions_of(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """Functions and methods written in the module's own file, by qualified name."""
    for owner in (module, *(value for value in vars(module).values() if isinstance(value, type))):
        for value in vars(owner).values():
            function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
            if isinstance(function, FunctionType) and function.__code__.co_filename == module.__file__:
                yield function.__qualname__, function


def _users_of(kernel: Any, module: ModuleType) -> list[ModuleType]:
    """The module and those of the package that import the kernel from it."""
    package = module.__name__.partition(".")[0]
    loaded = [other for name, other in sys.modules.items() if name.partition(".")[0] == package]
    return [other for other in loaded if vars(other).get(kernel.__name__) is kernel]


def _is_kernel(value: Any) -> bool:
    """Whether `value` came from `triton.jit`, compiled or interpreted."""
    return type(value).__name__ in ("JITFunction", "InterpretedFunction")

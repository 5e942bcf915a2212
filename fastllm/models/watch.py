"""Noticing that modules changed since something was made of them: hundreds of them in each step.

The attributes of a module lie in dictionaries that stay the same for its lifetime. Reading those costs a small part of
what the attributes cost.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

_PLAIN = (bool, int, float, str, tuple)
_MISSING = object()
_REQUIRES_GRAD = operator.attrgetter("requires_grad")


class Watch:
    """What something was made from. Objects are compared by identity, plain values by value.

    A copied or stored watch holds no more: the dictionaries that it read are those of the original.
    """

    def __init__(self, *, is_stale: bool = False) -> None:
        self._is_stale = is_stale
        self._mappings: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._empty: list[Any] = []
        self._filled: list[tuple[Any, Any]] = []
        self._tensors: list[torch.Tensor] = []
        self._pointers: list[int] = []
        self._trained: list[bool] = []
        self._answers: list[tuple[Callable[[Any], Any], Any, Any]] = []

    def __reduce__(self) -> tuple:
        return _stale, ()

    def entries(self, mapping: dict[str, Any], *keys: str) -> None:
        """What a dictionary holds under these keys, also if it is nothing."""
        for key in keys:
            self._mappings.append(mapping)
            self._keys.append(key)
            self._values.append(mapping.get(key, _MISSING))

    def contents(self, *containers: Any) -> None:
        """Which items lists and dictionaries have; most have none."""
        for container in containers:
            if container:
                self._filled.append((container, container.copy()))
            else:
                self._empty.append(container)

    def tensors(self, module: Any, *names: str) -> None:
        """Parameters of a module: which they are, where they lie, and whether they are trained."""
        self.entries(module._parameters, *names)
        for tensor in filter(torch.is_tensor, map(module._parameters.get, names)):
            self._tensors.append(tensor)
            self._pointers.append(tensor.data_ptr())
            self._trained.append(tensor.requires_grad)

    def answer(self, function: Callable[[Any], Any], argument: Any) -> None:
        """The plain value of `function(argument)`."""
        self._answers.append((function, argument, function(argument)))

    def include(self, other: Watch) -> None:
        """Watch what another does, too."""
        self._is_stale |= other._is_stale
        for name, found in vars(other).items():
            if isinstance(found, list):
                getattr(self, name).extend(found)

    def holds(self) -> bool:
        """Whether nothing changed."""
        if self._is_stale or any(self._empty):
            return False
        found = list(map(dict.get, self._mappings, self._keys, itertools.repeat(_MISSING)))
        if not same(found, self._values):
            return False
        # The weights of bitsandbytes are of a class of their own, which answers slowly.
        with torch._C.DisableTorchFunctionSubclass():
            if list(map(torch.Tensor.data_ptr, self._tensors)) != self._pointers:
                return False
            if list(map(_REQUIRES_GRAD, self._tensors)) != self._trained:
                return False
        return all(container == copied for container, copied in self._filled) and all(
            function(argument) == value for function, argument, value in self._answers
        )


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two sequences of one length have the same objects and equal plain values."""
    return all(map(operator.is_, left, right)) or all(
        now is then or (isinstance(now, _PLAIN) and now == then) for now, then in zip(left, right, strict=True)
    )


def _stale() -> Watch:
    return Watch(is_stale=True)

"""Recorded layers that run together: one call and one autograd node for as many as follow each other.

The first of them runs all. The others, which transformers calls as ever, find that they ran and hand on what they are
given, after they made sure that their own arguments are those that their recordings read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._compat import has_foreign_hooks, has_global_hooks
from ..kernels.recorded_pass import Pass, RecordedPass, Ticket, replay


@dataclass(frozen=True, slots=True, eq=False)
class Recordable:
    """How the layer of a module is recorded and run: `fused(module)` is the layer now, or why there is none;
    `run(x, layer, call)` runs it without a recording. `hands_on`: what it gives goes to the next layer as it is, and
    nowhere else."""

    module: nn.Module
    fused: Callable[[Any], Any]
    make_pass: Callable[[Any], Pass]
    run: Callable[[torch.Tensor, Any, Any], torch.Tensor]
    hands_on: bool


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """One recording and what it holds for."""

    recorded: RecordedPass
    layer: Any
    signature: tuple | None
    how: Recordable

    def runs_after(self, other: Known) -> bool:
        """Whether it can run with `other`, before its module is called."""
        return (
            other.how.hands_on
            and self.recorded.follows(other.recorded)
            and not has_foreign_hooks(self.how.module)
            and not has_global_hooks()
            and self.how.fused(self.how.module) is self.layer
        )


class Chain:
    """The layers from `first` on that one call runs, in one forward. `x` and `call` are those of the first."""

    def __init__(self, first: int, links: Sequence[Known], x: torch.Tensor, call: Any) -> None:
        self._first, self._links = first, links
        self._x, self._calls = x, [call]
        self._y: Callable[[], Any] = lambda: None

    @property
    def last(self) -> int:
        return self._first + len(self._links) - 1

    def __contains__(self, index: int) -> bool:
        """Whether layer `index` is run by one before it."""
        return self._first < index <= self.last

    def run(self, started: Ticket) -> torch.Tensor:
        """What the last layer gives. The first was started with the ticket given."""
        y = replay([known.recorded for known in self._links], self._x, started)
        self._y = weakref.ref(y)
        return y

    def passed(self, index: int, x: torch.Tensor, call: Any) -> Callable[[], torch.Tensor]:
        """What layer `index` gives, whose call is that of its recording."""
        self._check(x)
        self._calls.append(call)
        return lambda: x

    def run_without(self, index: int, x: torch.Tensor, call: Any, layer: Any) -> Callable[[], torch.Tensor]:
        """What layer `index` gives, whose call is another: all layers up to it run again."""
        self._check(x)

        def run() -> torch.Tensor:
            y = self._x
            for known, its_call in zip(self._links, self._calls, strict=False):
                y = known.how.run(y, known.layer, its_call)
            return self._links[index - self._first].how.run(y, layer, call)

        return run

    def _check(self, x: torch.Tensor) -> None:
        if x is not self._y():
            raise RuntimeError(
                "the hidden states were changed between two layers that fastllm ran together: load the model with "
                "patch=False to put something of your own between the layers of a model"
            )

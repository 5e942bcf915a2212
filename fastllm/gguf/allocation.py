"""Spend a budget of bytes where it lowers the divergence most: a knapsack over tensors and their types.

Minimise  sum_t F[t, type_t]  subject to  sum_t bytes[t, type_t] <= budget,  F the expected divergence. The relaxed
problem is solved exactly by walking down the lower convex hulls of all tensors in the order of their slopes (Lagrange:
Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988); what is left of the budget goes
to whatever still fits and helps most. The result is optimal up to the worth of one tensor's step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .container import GGUFError


@dataclass(frozen=True, slots=True)
class _Option:
    kind: str
    size: int
    cost: float


@dataclass(slots=True)
class _Item:
    """Tensors that share a type, with their options from the smallest on; `chosen` is the one taken."""

    names: tuple[str, ...]
    options: list[_Option]
    hull: list[int]
    chosen: int = 0


def allocate_types(
    sensitivities: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, Mapping[str, int]],
    budget: int,
    *,
    tied: Iterable[Sequence[str]] = (),
) -> dict[str, str]:
    """The type of each tensor that minimises the summed sensitivity within `budget` bytes.

    `sensitivities[tensor][type]` is the expected divergence, `sizes[tensor][type]` its bytes; a tensor may have any of
    the types that both name. Tensors of one group in `tied` get the same type.

    Raises `GGUFError` where even the smallest types do not fit.
    """
    items = _items(sensitivities, sizes, tied)
    left = budget - sum(item.options[0].size for item in items)
    if left < 0:
        raise GGUFError(
            f"the smallest types need {budget - left:,} bytes, the budget is {budget:,}",
            fix="raise the budget, or allow smaller types",
        )
    left = _descend_hulls(items, left)
    _fill(items, left)
    return {name: item.options[item.chosen].kind for item in items for name in item.names}


def _items(
    sensitivities: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, Mapping[str, int]],
    tied: Iterable[Sequence[str]],
) -> list[_Item]:
    groups = [tuple(group) for group in tied]
    grouped = {name for group in groups for name in group}
    items = []
    for names in [*groups, *((name,) for name in sensitivities if name not in grouped)]:
        kinds = set.intersection(*(set(sensitivities[name]) & set(sizes[name]) for name in names))
        if not kinds:
            raise GGUFError("no type is possible for these tensors", where=", ".join(names))
        options = [
            _Option(kind, sum(sizes[name][kind] for name in names), sum(sensitivities[name][kind] for name in names))
            for kind in kinds
        ]
        useful = _without_dominated(options)
        items.append(_Item(names, useful, _lower_hull(useful)))
    return items


def _without_dominated(options: list[_Option]) -> list[_Option]:
    """Options by size, each with less cost than all smaller ones."""
    useful: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.size, option.cost)):
        if not useful or option.cost < useful[-1].cost:
            useful.append(option)
    return useful


def _lower_hull(options: list[_Option]) -> list[int]:
    """Indices of the options on the lower convex hull of cost over size."""
    hull: list[int] = []
    for i, option in enumerate(options):
        while len(hull) > 1 and _slope(options[hull[-2]], options[hull[-1]]) >= _slope(options[hull[-2]], option):
            hull.pop()
        hull.append(i)
    return hull


def _slope(smaller: _Option, larger: _Option) -> float:
    """Cost per byte of the step; negative."""
    return (larger.cost - smaller.cost) / (larger.size - smaller.size)


def _descend_hulls(items: list[_Item], left: int) -> int:
    """Take the steepest step of all hulls again and again. Returns the bytes that are left."""
    heap: list[tuple[float, int, int]] = []

    def push(i: int, position: int) -> None:
        item = items[i]
        if position + 1 < len(item.hull):
            here, there = item.options[item.hull[position]], item.options[item.hull[position + 1]]
            heapq.heappush(heap, (_slope(here, there), i, position + 1))

    for i in range(len(items)):
        push(i, 0)
    while heap:
        _, i, position = heapq.heappop(heap)
        item = items[i]
        extra = item.options[item.hull[position]].size - item.options[item.chosen].size
        if extra <= left:
            left -= extra
            item.chosen = item.hull[position]
            push(i, position)
    return left


def _fill(items: list[_Item], left: int) -> None:
    """Spend what is left on single changes, also off the hulls: the largest gain that fits, until none does."""
    while True:
        best: tuple[float, int, int] | None = None
        for i, item in enumerate(items):
            here = item.options[item.chosen]
            for j in range(item.chosen + 1, len(item.options)):
                gain = here.cost - item.options[j].cost
                if item.options[j].size - here.size <= left and (best is None or gain > best[0]):
                    best = gain, i, j
        if best is None:
            return
        _, i, j = best
        left -= items[i].options[j].size - items[i].options[items[i].chosen].size
        items[i].chosen = j

"""Which rows go together: groups of them within a length, best fit first."""

from __future__ import annotations

import bisect
from collections.abc import Mapping


def grouped(lengths: Mapping[int, int], limit: int) -> list[list[int]]:
    """Rows, by number, in groups of at most `limit` tokens; `lengths` gives each row's, none longer than that.

    Best-fit decreasing: the longest row first, each into the fullest group that still has room for it. Groups come in
    the order of their first rows, as do the rows in them, so that the data's order is changed as little as may be.
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        at = bisect.bisect_left(rooms, (lengths[row], 0))
        room, group = rooms.pop(at) if at < len(rooms) else (limit, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(row)
        bisect.insort(rooms, (room - lengths[row], group))
    return sorted(sorted(group) for group in groups)

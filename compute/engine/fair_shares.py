"""Whose turn it is: every owner the same share of what is run, however many sessions each has.

Knows owners and counts of positions; knows neither sessions' contents nor batches. Each owner has a score,
the positions that were run for it; the lowest goes next. The difficulty is who comes and goes: time away
earns no credit, or one owner could run alone for as long as it was away, so whoever comes back starts
where those are that stayed. What was run too much is remembered.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class FairShares:
    """Scores of the owners that have sessions."""

    def __init__(self) -> None:
        self._scores: dict[Hashable, int] = {}
        # The score of who was served last: nobody who waited is far below.
        self._now = 0
        self._present: set[Hashable] = set()

    def begin_turn(self, owners: set[Hashable]) -> None:
        """These owners have something to run. Those who had nothing the last time come in now."""
        for owner in owners - self._present:
            self._scores[owner] = max(self._scores.get(owner, 0), self._now)
        self._present = owners

    def in_order(self, waiting: Mapping[Hashable, Sequence[T]]) -> Iterator[T]:
        """By owner what waits: the next of the owner with the lowest score, who may be charged for it meanwhile."""
        heap = [(self._scores[owner], number, owner, 0) for number, owner in enumerate(waiting)]
        heapq.heapify(heap)
        while heap:
            _, number, owner, index = heapq.heappop(heap)
            yield waiting[owner][index]
            if index + 1 < len(waiting[owner]):
                heapq.heappush(heap, (self._scores[owner], number, owner, index + 1))

    def charge(self, owner: Hashable, positions: int) -> None:
        """So many positions are run for the owner."""
        self._now = max(self._now, self._scores[owner])
        self._scores[owner] += positions

    def forget(self, owner: Hashable) -> None:
        """The owner has no session any more."""
        self._scores.pop(owner, None)
        self._present.discard(owner)

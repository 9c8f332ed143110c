"""Gives every owner the same share of the engine, however many sessions it has.

Each owner has a score: the positions that were run for it. The lowest score goes next. Time without work must earn
no credit, or an owner that comes back could run alone for as long as it was away; so a returning owner starts at the
score of those that stayed. Positions that were run beyond the share stay counted.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class FairShares:
    """The scores of the owners that have sessions."""

    def __init__(self) -> None:
        self._scores: dict[Hashable, int] = {}
        # The score of the owner that was served last; no waiting owner is far below it.
        self._now = 0
        self._present: set[Hashable] = set()

    def begin_turn(self, owners: set[Hashable]) -> None:
        """Begin a turn: these owners have something to run. Owners that had nothing the last time start at the present
        score.
        """
        for owner in owners - self._present:
            self._scores[owner] = max(self._scores.get(owner, 0), self._now)
        self._present = owners

    def in_order(self, waiting: Mapping[Hashable, Sequence[T]]) -> Iterator[T]:
        """Yield what waits, each time for the owner with the lowest score. The caller may charge the owner
        meanwhile.
        """
        heap = [(self._scores[owner], number, owner, 0) for number, owner in enumerate(waiting)]
        heapq.heapify(heap)
        while heap:
            _, number, owner, index = heapq.heappop(heap)
            yield waiting[owner][index]
            if index + 1 < len(waiting[owner]):
                heapq.heappush(heap, (self._scores[owner], number, owner, index + 1))

    def charge(self, owner: Hashable, positions: int) -> None:
        """Count that `positions` are run for the owner."""
        self._now = max(self._now, self._scores[owner])
        self._scores[owner] += positions

    def forget(self, owner: Hashable) -> None:
        """Forget an owner that has no session any more."""
        self._scores.pop(owner, None)
        self._present.discard(owner)

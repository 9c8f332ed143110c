"""Gives every owner its share of the engine, however many sessions it has: as much as its weight says.

Each owner has a score: the positions that were run for it, divided by its weight. The lowest score goes next. Time
without work must earn no credit, or an owner that comes back could run alone for as long as it was away; so a returning
owner starts at the score of those that stayed. Positions that were run beyond the share stay counted, for ten minutes
also after the owner's last session: otherwise closing a session after each prompt would cancel the debt.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

# How long the debt of an owner without sessions is kept, and of how many such owners: those that left first are
# forgotten first.
KEPT_S: Final = 600.0
MAX_ABSENT: Final = 4096


class FairShares:
    """The scores of the owners that have sessions, and the debts of those that had. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._scores: dict[Hashable, float] = {}
        # The score of the owner that was served last; no waiting owner is far below it.
        self._now = 0.0
        self._present: set[Hashable] = set()
        # When owners that are in debt left, the first first.
        self._left: dict[Hashable, float] = {}

    def begin_turn(self, owners: set[Hashable]) -> None:
        """Begin a turn: these owners have something to run. Owners that had nothing the last time start at the present
        score.
        """
        self._forget_old_debts()
        for owner in owners - self._present:
            self._left.pop(owner, None)
            self._scores[owner] = max(self._scores.get(owner, 0.0), self._now)
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

    def charge(self, owner: Hashable, positions: int, weight: float = 1.0) -> None:
        """Count that `positions` are run for the owner, who gets `weight` times the share of an owner of weight 1."""
        self._now = max(self._now, self._scores[owner])
        self._scores[owner] += positions / weight

    def leave(self, owner: Hashable) -> None:
        """Note that the owner has no session any more. Only its debt is kept, for a while."""
        self._present.discard(owner)
        if self._scores.get(owner, 0.0) > self._now:
            self._left[owner] = self._clock()
        else:
            self._scores.pop(owner, None)
        self._forget_old_debts()

    def _forget_old_debts(self) -> None:
        latest = self._clock() - KEPT_S
        while self._left:
            owner, left_at = next(iter(self._left.items()))
            if left_at > latest and len(self._left) <= MAX_ABSENT:
                return
            del self._left[owner]
            self._scores.pop(owner, None)

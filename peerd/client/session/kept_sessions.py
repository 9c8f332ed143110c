"""Keeps the sessions of answers that have ended, for prompts that begin with what they computed.

A chat's next prompt begins with its last one and the answer to it. The servers then have its KV already, and only what
is new must be computed. A kept session holds memory on each of its servers, so all of them together are bounded, and
each for a time only. Servers take the KV of idle sessions back when others need it; then the session computes its past
again, as after any loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Final

import trio

from peerd.compute.prefixes import common_length

if TYPE_CHECKING:
    from peerd.client.session.session import Session
    from peerd.routing.directory.offer import Offer

#: A session that nobody used for this long is closed: servers keep an idle one as long.
KEPT_S: Final = 300.0
#: A session is not used again for fewer positions than this: a new one can choose better servers.
LEAST_SHARED: Final = 32
#: What is asked for beyond an answer's own length, for the next turns: at least this, where it is free; never less than
#: the second, which is a turn or two.
SPARE: Final = 2048
LEAST_SPARE: Final = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """A session of one row: how many positions it may have, how many can be cut off its end, and whether its last hop
    draws tokens.
    """

    max_length: int
    max_rollback: int
    head: bool = False

    def serves(self, needed: Shape) -> bool:
        """Whether a session of this shape serves an answer that needs another one."""
        is_large_enough = self.max_length >= needed.max_length and self.max_rollback >= needed.max_rollback
        return is_large_enough and self.head == needed.head


@dataclass(frozen=True, slots=True, eq=False)
class AnswerSession:
    """A session for one answer. `computed`: how many of the prompt's positions it has already. `shape`: None if it
    cannot be kept.
    """

    session: Session
    computed: int
    shape: Shape | None


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A session whose only row holds `ids`, all of which were computed."""

    session: Session
    ids: list[int]
    shape: Shape

    def shared(self, prompt: list[int]) -> int:
        """How many of the prompt's first positions need not be computed again. The last one always is, for its
        result.
        """
        return common_length(self.ids, prompt[:-1])

    def saves(self, prompt: list[int]) -> int:
        """How many positions of the prompt it saves; 0 if it cannot be cut as far back as they go."""
        shared = self.shared(prompt)
        return shared if self.session.log.length(0) - shared <= self.shape.max_rollback else 0


def roomy_length(needed: int, most: int, offers: Sequence[Offer]) -> int:
    """How many positions to ask for, so that the next turns of a chat fit too: twice `needed`, or SPARE more, and at
    most `most` in all. Half as many more, and so on, where the servers do not have twice that free: others must find
    room as well.
    """
    spare = min(max(needed, SPARE), most - needed)
    while spare >= LEAST_SPARE:
        if _is_free(2 * (needed + spare), offers):
            return needed + spare
        spare //= 2
    return needed


def _is_free(length: int, offers: Iterable[Offer]) -> bool:
    """Whether each block that is offered has a server with so many positions free."""
    blocks: set[int] = set()
    free: set[int] = set()
    for offer in offers:
        span = range(offer.span.start, offer.span.end)
        blocks.update(span)
        if offer.record.free_tokens >= length:
            free.update(span)
    return free == blocks


class KeptSessions:
    """The kept sessions of one model, of at most `budget` positions in all. `tasks` owns their timers."""

    def __init__(self, budget: int, tasks: trio.Nursery) -> None:
        self.budget = budget
        self._tasks = tasks
        # The one that was kept last comes last.
        self._kept: list[_Kept] = []

    def __repr__(self) -> str:
        return f"<KeptSessions {self.positions} of {self.budget} positions in {len(self._kept)} sessions>"

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def positions(self) -> int:
        """How many positions the kept sessions hold on each of their servers."""
        return sum(kept.shape.max_length for kept in self._kept)

    def take(self, prompt: list[int], needed: Shape) -> AnswerSession | None:
        """The session that has most of the prompt's beginning, or None. It is the caller's from now on."""
        self._close_outgrown(prompt, needed)
        found = [kept for kept in self._kept if kept.shape.serves(needed) and not kept.session.closed]
        saved, best = max(((kept.saves(prompt), kept) for kept in found), key=itemgetter(0), default=(0, None))
        if best is None or saved < LEAST_SHARED:
            return None
        self._kept.remove(best)
        return AnswerSession(best.session, saved, best.shape)

    def keep(self, session: Session, ids: Sequence[int], shape: Shape) -> None:
        """Keep a session whose row begins with `ids`. The oldest ones are closed to make room."""
        if session.closed or shape.max_length > self.budget or len(ids) < LEAST_SHARED:
            session.close()
            return
        session.rest()
        kept = _Kept(session, list(ids), shape)
        self._kept.append(kept)
        while self.positions > self.budget:
            self._close(self._kept[0])
        self._tasks.start_soon(self._close_later, kept)

    def _close_outgrown(self, prompt: list[int], needed: Shape) -> None:
        """Close what a chat has no room left in: its next turns will not ask for it either."""
        for kept in list(self._kept):
            if kept.shape.max_length < needed.max_length and kept.shared(prompt) == len(kept.ids):
                self._close(kept)

    def _close(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        kept.session.close()

    async def _close_later(self, kept: _Kept) -> None:
        await trio.sleep(KEPT_S)
        # It may have been taken, and kept again as another one.
        if kept in self._kept:
            self._close(kept)

"""Whom a client found full, and when it asks again: ever more seldom, and never in step with others.

Knows refusals, hints and the time; plans and opens nothing. The difficulty is a full swarm with many clients: if each
asks again as soon as it was refused, servers do little but refuse, and whoever asks oftenest gets in. So a client stays
away from a peer for a random time, from a range that doubles (exponential backoff with full jitter). And where it can
wait in a server's queue without holding what others wait for, it does that instead: there who came first is let in
first, and no room stays empty while somebody wants it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import trio

from peerd.protocol.errors import NoRoom, Overloaded
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span

# The first delay is drawn from so many seconds, then from twice as many each time, up to the second figure: a session
# takes about as long.
FIRST_RANGE_S = 1.0
MAX_RANGE_S = 30.0
# Whoever waits at one hop alone, having found nobody with room, may do so for this long. Along a chain every hop waits
# as usual and no longer, for the other hops would be held meanwhile (spec/session.md, "Opening").
QUEUE_S = 30.0
# Meanwhile another server may have come, which is to be of use within 5 s.
NEWCOMER_S = 4.0


@dataclass(slots=True)
class _Busy:
    refusals: int
    until_s: float


class BusyPeers:
    """The full peers that one session met since it last had a chain. Times are Trio's."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._peers: dict[PeerId, _Busy] = {}
        self._refusals = 0
        self._last: Overloaded | None = None

    def __repr__(self) -> str:
        return f"<BusyPeers {len(self._peers)} peers, {self._refusals} refusals>"

    def refused(self, peer_id: PeerId, error: Overloaded) -> None:
        """The peer is full: stay away from it for a while, about as long as it says."""
        before = self._peers[peer_id].refusals if peer_id in self._peers else 0
        delay_s = self._rng.uniform(0, min(MAX_RANGE_S, FIRST_RANGE_S * 2.0**before))
        # A hint is a stranger's word: it keeps us away no longer than we would stay of our own accord.
        hinted_s = min(error.retry_after_s, MAX_RANGE_S) * self._rng.uniform(0.5, 1.0)
        self._peers[peer_id] = _Busy(before + 1, trio.current_time() + max(delay_s, hinted_s))
        self._refusals += 1
        self._last = error

    def now(self) -> frozenset[PeerId]:
        """Whom not to ask now."""
        now = trio.current_time()
        return frozenset(peer_id for peer_id, busy in self._peers.items() if now < busy.until_s)

    async def wait(self, until_s: float) -> None:
        """Wait until the first of them may be asked again, or it is time to look for newcomers, but no longer."""
        now = trio.current_time()
        next_s = min((busy.until_s for busy in self._peers.values() if busy.until_s > now), default=now)
        await trio.sleep_until(min(next_s, now + NEWCOMER_S * self._rng.uniform(0.5, 1.0), until_s))

    def timeout_ms(self, usual_ms: int, left_s: float, *, alone: bool) -> int:
        """How long to wait for room at a hop: in a queue, if all were full and we hold nothing beside it (`alone`).

        left_s: seconds of patience that are left.
        """
        if not alone or not self._refusals:
            return usual_ms
        return max(usual_ms, round(1000 * min(QUEUE_S, left_s)))

    def error(self, blocks: Span, waited_s: float) -> Overloaded:
        """What a caller hears whose patience has ended."""
        last = self._last or Overloaded("")
        message = (
            f"everybody who serves blocks {blocks} is full: asked {self._refusals} times in {waited_s:.0f} s;"
            f" the last answer was: {last}"
        )
        if isinstance(last, NoRoom):
            return NoRoom(message, last.free_tokens, last.retry_after_s)
        return type(last)(message, last.retry_after_s)

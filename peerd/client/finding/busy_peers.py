"""Remembers which peers refused because they were full, and when to ask each again. Times are arguments.

In a full swarm with many clients, servers would do little but refuse if every client asked again at once, and the
client that asks most often would win. So a client stays away from a full peer for a random time, from a range that
doubles with each refusal (exponential backoff with full jitter). If a client can wait in a server's queue without
holding memory for which others wait, it does that instead: a queue admits sessions in the order in which they came, and
no memory stays free while a session wants it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from peerd.protocol.errors import NoRoom, Overloaded
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span

# The first delay is drawn from this many seconds, and each next one from a range twice as long, up to MAX_RANGE_S: a
# session takes about that long.
FIRST_RANGE_S = 1.0
MAX_RANGE_S = 30.0
# How long a client may wait in the queue of one hop if it holds no other hop and found none with free memory. Along a
# chain the usual time holds, because the other hops would be held meanwhile (spec/sessions/session.md, "Opening").
QUEUE_S = 30.0
# While all are full, look for new servers this often: a new server should be of use within 5 s.
NEWCOMER_S = 4.0


@dataclass(slots=True)
class _Busy:
    refusals: int
    until_s: float


class BusyPeers:
    """The full peers that one search for a chain met."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._peers: dict[PeerId, _Busy] = {}
        self._refusals = 0
        self._last: Overloaded | None = None

    def __repr__(self) -> str:
        return f"<BusyPeers {len(self._peers)} peers, {self._refusals} refusals>"

    def refused(self, peer_id: PeerId, error: Overloaded, now: float) -> None:
        """Note that the peer is full: leave it out for a while, about as long as the peer suggests."""
        before = self._peers[peer_id].refusals if peer_id in self._peers else 0
        delay_s = self._rng.uniform(0, min(MAX_RANGE_S, FIRST_RANGE_S * 2.0**before))
        # The hint comes from a stranger: it is capped at the longest delay that we would choose ourselves.
        hinted_s = min(error.retry_after_s, MAX_RANGE_S) * self._rng.uniform(0.5, 1.0)
        self._peers[peer_id] = _Busy(before + 1, now + max(delay_s, hinted_s))
        self._refusals += 1
        self._last = error

    @property
    def last(self) -> Overloaded | None:
        """What the last of them said."""
        return self._last

    def away(self, now: float) -> frozenset[PeerId]:
        """The peers not to ask now."""
        return frozenset(peer_id for peer_id, busy in self._peers.items() if now < busy.until_s)

    def next_try(self, now: float, until_s: float) -> float:
        """When one of the peers may be asked again or it is time to look for new servers, at most `until_s`."""
        next_s = min((busy.until_s for busy in self._peers.values() if busy.until_s > now), default=now)
        return min(next_s, now + NEWCOMER_S * self._rng.uniform(0.5, 1.0), until_s)

    def timeout_ms(self, usual_ms: int, left_s: float, *, alone: bool) -> int:
        """How long a hop may keep us waiting for memory, in ms: long, in its queue, if all were full and we hold no
        other hop.

        alone: whether we hold no other hop.
        left_s: the seconds of patience that are left.
        """
        if not alone or not self._refusals:
            return usual_ms
        return max(usual_ms, round(1000 * min(QUEUE_S, left_s)))

    def error(self, blocks: Span, waited_s: float) -> Overloaded:
        """The error for a caller whose patience is over."""
        last = self._last or Overloaded("")
        message = (
            f"all servers of blocks {blocks} are full: asked {self._refusals} times in {waited_s:.0f} s;"
            f" the last answer was: {last}"
        )
        if isinstance(last, NoRoom):
            return NoRoom(message, last.free_tokens, last.retry_after_s)
        return type(last)(message, last.retry_after_s)

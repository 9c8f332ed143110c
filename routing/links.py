"""How our own connections to peers have been: who fails and is to be avoided, and how far away each one is.

Knows what it is told and the time it is given; measures nothing itself. The difficulty is to forgive:
a peer that failed leaves the routes in that instant, but must come back by itself, or one bad minute
of our own network would leave us nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peerd.protocol.identity import PeerId

# The first failure of a healthy peer is mostly a restart; a peer that keeps failing is asked a few times an hour.
FIRST_AVOIDANCE_S = 5.0
MAX_AVOIDANCE_S = 600.0
# RFC 6298: weight of a new sample in the smoothed round-trip time.
RTT_GAIN = 0.125
# Strangers make peers up; beyond so many, those heard of longest ago are forgotten.
MAX_PEERS = 16384


@dataclass(slots=True)
class _Link:
    failures: int = 0
    avoided_until_s: float = 0.0
    why: str = ""
    rtt_s: float | None = None


class Links:
    """What we know about our links to other peers. `now` counts seconds steadily, from any start."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._links: dict[PeerId, _Link] = {}

    def failed(self, peer_id: PeerId, why: str = "") -> float:
        """The peer failed us: avoid it from this instant, twice as long each time. Returns for how many seconds."""
        link = self._touch(peer_id)
        link.why = why or link.why
        # Failures that several requests report at once are one failure.
        if self._now() >= link.avoided_until_s:
            delay_s = min(FIRST_AVOIDANCE_S * 2.0**link.failures, MAX_AVOIDANCE_S)
            link.failures += 1
            link.avoided_until_s = self._now() + delay_s
        return link.avoided_until_s - self._now()

    def succeeded(self, peer_id: PeerId) -> None:
        """The peer did what we asked: it is as good as one that never failed."""
        link = self._touch(peer_id)
        link.failures = 0
        link.avoided_until_s = 0.0
        link.why = ""

    def is_avoided(self, peer_id: PeerId) -> bool:
        link = self._links.get(peer_id)
        return link is not None and self._now() < link.avoided_until_s

    def why_avoided(self, peer_id: PeerId) -> str:
        """What was said of its last failure; "" if nothing was, or it is not avoided."""
        link = self._links.get(peer_id)
        return link.why if link is not None and self._now() < link.avoided_until_s else ""

    def avoided(self) -> frozenset[PeerId]:
        """Everybody to leave out of a chain now."""
        now = self._now()
        return frozenset(peer_id for peer_id, link in self._links.items() if now < link.avoided_until_s)

    def measured(self, peer_id: PeerId, rtt_s: float, *, gain: float = RTT_GAIN) -> None:
        """A round trip to the peer took `rtt_s` seconds; `gain` is how much that counts beside those before.

        Raises ValueError if it is negative or not finite.
        """
        if not 0 <= rtt_s < float("inf"):
            raise ValueError(f"a round trip takes a finite time of at least 0 s, not {rtt_s}")
        link = self._touch(peer_id)
        link.rtt_s = rtt_s if link.rtt_s is None else link.rtt_s + gain * (rtt_s - link.rtt_s)

    def rtt_s(self, peer_id: PeerId) -> float | None:
        """The smoothed round-trip time, in seconds; None if it was never measured."""
        link = self._links.get(peer_id)
        return None if link is None else link.rtt_s

    def rtts_s(self) -> dict[PeerId, float]:
        """Every measured round-trip time, in seconds."""
        return {peer_id: link.rtt_s for peer_id, link in self._links.items() if link.rtt_s is not None}

    def _touch(self, peer_id: PeerId) -> _Link:
        link = self._links.pop(peer_id, None) or _Link()
        self._links[peer_id] = link
        if len(self._links) > MAX_PEERS:
            del self._links[next(iter(self._links))]
        return link

"""How our own connections to peers have been: who fails and is to be avoided, and how far away each one is.

Knows what it is told and the time it is given; measures nothing itself and asks nobody. The difficulty is to
forgive: a peer that failed leaves the routes in that instant, but must come back by itself, or one bad minute
of our own network would leave us nobody. It comes back by proof, not on trust: somebody asks it first, so that no
user's session is the test. Two kinds of failure return differently. Who answers all the while and fails in its
work waits, twice as long each time. Who could not be reached, and now can, was down or cut off and is not any more:
what it failed at then says nothing about it now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peerd.protocol.identity import PeerId

# The first failure of a healthy peer is mostly a restart; a peer that keeps failing is asked a few times an hour.
FIRST_AVOIDANCE_S = 5.0
MAX_AVOIDANCE_S = 600.0
# A peer that was announced anew is asked at once, but not again and again: it may announce every step.
MIN_ASKING_S = 1.0
# Who left that many questions unanswered, over 20 minutes, is asked again only when it is announced anew.
MAX_UNANSWERED = 8
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


@dataclass(slots=True)
class _Doubt:
    """A peer that has to prove that it is there.

    ask_at_s: when to ask it next; inf while that is being done.
    unanswered: questions since it failed.
    announced_seq: the newest announcement of it that we saw since then.
    """

    ask_at_s: float
    asked_at_s: float
    unanswered: int = 0
    announced_seq: int = 0


def _nothing() -> None:
    pass


class Links:
    """What we know about our links to other peers. `now` counts seconds steadily, from any start.

    by_proof: whether somebody calls `take_doubted` and tells what came of it; without, time alone forgives.
    """

    def __init__(self, now: Callable[[], float], *, by_proof: bool = False) -> None:
        self._now = now
        self._by_proof = by_proof
        self._links: dict[PeerId, _Link] = {}
        self._doubts: dict[PeerId, _Doubt] = {}
        self.on_doubt: Callable[[], None] = _nothing
        """Called when somebody is to be asked sooner than before."""

    def failed(self, peer_id: PeerId, why: str = "") -> float:
        """The peer failed us: avoid it from this instant, twice as long each time. Returns for how many seconds."""
        link = self._touch(peer_id)
        link.why = why or link.why
        # Failures that several requests report at once are one failure.
        if self._now() >= link.avoided_until_s:
            delay_s = min(FIRST_AVOIDANCE_S * 2.0**link.failures, MAX_AVOIDANCE_S)
            link.failures += 1
            link.avoided_until_s = self._now() + delay_s
            self.doubt(peer_id)
        return link.avoided_until_s - self._now()

    def doubt(self, peer_id: PeerId) -> None:
        """The peer may be gone, which is no failure of it: avoid it until it answers."""
        if self._by_proof and peer_id not in self._doubts:
            self._touch(peer_id)
            self._doubts[peer_id] = _Doubt(self._now(), self._now())
            self.on_doubt()

    def succeeded(self, peer_id: PeerId) -> None:
        """The peer did what we asked: it is as good as one that never failed."""
        link = self._touch(peer_id)
        link.failures = 0
        link.avoided_until_s = 0.0
        link.why = ""
        self._doubts.pop(peer_id, None)

    def forgive(self) -> None:
        """We slept: who seems to have failed since may not have. Whoever is doubted still has to answer."""
        for link in self._links.values():
            if link.avoided_until_s > self._now():
                link.avoided_until_s = self._now()
                link.failures -= 1

    def is_avoided(self, peer_id: PeerId) -> bool:
        """Whether to leave it out of a chain now."""
        link = self._links.get(peer_id)
        return peer_id in self._doubts or (link is not None and self._now() < link.avoided_until_s)

    def why_avoided(self, peer_id: PeerId) -> str:
        """What was said of its last failure; "" if nothing was, or it is not avoided."""
        link = self._links.get(peer_id)
        return link.why if link is not None and self.is_avoided(peer_id) else ""

    def avoided(self) -> frozenset[PeerId]:
        """Everybody to leave out of a chain now."""
        now = self._now()
        late = frozenset(peer_id for peer_id, link in self._links.items() if now < link.avoided_until_s)
        return late | self._doubts.keys()

    # Proof.

    @property
    def asks_at_s(self) -> float:
        """When somebody is to be asked next; inf for nobody."""
        return min((doubt.ask_at_s for doubt in self._doubts.values()), default=float("inf"))

    def take_doubted(self) -> list[PeerId]:
        """Whom to ask now whether they are there. For each, `answered` or `unanswered` is to be told."""
        now = self._now()
        due = [peer_id for peer_id, doubt in self._doubts.items() if doubt.ask_at_s <= now]
        for peer_id in due:
            self._doubts[peer_id].ask_at_s = float("inf")
            self._doubts[peer_id].asked_at_s = now
        return due

    def answered(self, peer_id: PeerId) -> None:
        """The peer is there. If it was not before, it is as good as new; else it waits for the rest of its time."""
        doubt = self._doubts.pop(peer_id, None)
        if doubt is not None and doubt.unanswered:
            self._touch(peer_id).avoided_until_s = self._now()

    def unanswered(self, peer_id: PeerId, why: str = "") -> None:
        """The peer cannot be reached: ask it again, ever more seldom."""
        if (doubt := self._doubts.get(peer_id)) is not None:
            delay_s = min(FIRST_AVOIDANCE_S * 2.0**doubt.unanswered, MAX_AVOIDANCE_S)
            doubt.unanswered += 1
            self._touch(peer_id).why = why
            doubt.ask_at_s = self._now() + delay_s if doubt.unanswered < MAX_UNANSWERED else float("inf")
            self.on_doubt()

    def announced(self, peer_id: PeerId, seq: int) -> None:
        """The peer has announced itself, as number `seq`. Who could not be reached may be back: ask."""
        doubt = self._doubts.get(peer_id)
        if doubt is None or seq <= doubt.announced_seq:
            return
        doubt.announced_seq = seq
        is_being_asked = doubt.ask_at_s == float("inf") and doubt.unanswered < MAX_UNANSWERED
        if doubt.unanswered and not is_being_asked:
            doubt.ask_at_s = min(doubt.ask_at_s, max(self._now(), doubt.asked_at_s + MIN_ASKING_S))
            self.on_doubt()

    @property
    def has_doubts(self) -> bool:
        """Whether `announced` would make any difference."""
        return bool(self._doubts)

    # Distance.

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
            forgotten = next(iter(self._links))
            del self._links[forgotten]
            self._doubts.pop(forgotten, None)
        return link

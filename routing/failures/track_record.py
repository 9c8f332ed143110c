"""Remembers how our own connections to peers went: which peers to avoid, and how far away each is.

A peer that failed leaves the routes at once. It must also come back by itself, or one bad minute of our own network
would leave us no peers. It comes back by proof: we ask it first, so that no user's session is the test. There are
two kinds of failure. A peer that answers questions but fails at its work is avoided for a time that doubles with
each failure. A peer that could not be reached and now answers was down or cut off; its earlier failures say nothing
about it now, so it returns at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peerd.protocol.identity import PeerId
from peerd.routing.directory.standing import Standing, unknown
from peerd.routing.failures.convictions import Convictions

# The first failure of a healthy peer is mostly a restart; a peer that keeps failing is asked a few times an hour.
FIRST_AVOIDANCE_S = 5.0
MAX_AVOIDANCE_S = 600.0
# A peer with a new announcement is asked at once, but at most this often, since it may announce with every step.
MIN_ASKING_S = 1.0
# A peer that left this many questions unanswered, over 20 minutes, is asked again only when it is announced anew.
MAX_UNANSWERED = 8
# RFC 6298: weight of a new sample in the smoothed round-trip time.
RTT_GAIN = 0.125
# Attackers can make up peers; beyond this number, those heard of longest ago are forgotten.
MAX_PEERS = 16384


@dataclass(slots=True)
class _Entry:
    failures: int = 0
    avoided_until_s: float = 0.0
    why: str = ""
    rtt_s: float | None = None
    # The public network in which we reached it, "" for none; None: never reached.
    network: str | None = None
    has_served: bool = False
    shown_throughput: float = 0.0


@dataclass(slots=True)
class _Doubt:
    """A peer that must prove that it is there.

    ask_at_s: when to ask it next; inf while it is being asked.
    unanswered: questions without an answer since it failed.
    announced_seq: the newest announcement of it that we saw since then.
    """

    ask_at_s: float
    asked_at_s: float
    unanswered: int = 0
    announced_seq: int = 0


@dataclass(frozen=True, slots=True)
class Avoidance:
    """A peer that we leave out of our chains, for status displays.

    for_s: seconds until it is used again; 0 if it only has to answer first. failures: in a row.
    """

    peer_id: PeerId
    for_s: float
    failures: int
    why: str


class TrackRecord:
    """Our experience with other peers. `now` counts seconds steadily, from any start.

    by_proof: whether the caller asks the peers that `take_doubted` returns and reports the results; otherwise a peer
    returns when its time is over.
    convictions: the peers that computed something else than others, which nothing that is noted here excuses.
    on_served: called when a peer has answered a session of ours.
    """

    def __init__(
        self,
        now: Callable[[], float],
        *,
        by_proof: bool = False,
        convictions: Convictions | None = None,
        on_served: Callable[[PeerId], None] = lambda _peer_id: None,
    ) -> None:
        self.convictions = convictions or Convictions(now)
        self._now = now
        self._by_proof = by_proof
        self._entries: dict[PeerId, _Entry] = {}
        self._doubts: dict[PeerId, _Doubt] = {}
        self._on_served = on_served
        #: Called when a peer is to be asked sooner than before.
        self.on_doubt: list[Callable[[], None]] = []

    def failed(self, peer_id: PeerId, why: str = "") -> float:
        """Note a failure of the peer: avoid it from now on, twice as long each time. Returns for how many seconds."""
        entry = self._touch(peer_id)
        entry.why = why or entry.why
        # Failures that several requests report at once count as one.
        if self._now() >= entry.avoided_until_s:
            delay_s = min(FIRST_AVOIDANCE_S * 2.0**entry.failures, MAX_AVOIDANCE_S)
            entry.failures += 1
            entry.avoided_until_s = self._now() + delay_s
            self.doubt(peer_id)
        return entry.avoided_until_s - self._now()

    def doubt(self, peer_id: PeerId) -> None:
        """Avoid the peer until it answers, without counting a failure: it may be gone."""
        if self._by_proof and peer_id not in self._doubts:
            self._touch(peer_id)
            self._doubts[peer_id] = _Doubt(self._now(), self._now())
            self._tell_of_doubt()

    def succeeded(self, peer_id: PeerId) -> None:
        """Note a success: the peer is as good as one that never failed."""
        entry = self._touch(peer_id)
        entry.has_served = True
        self._on_served(peer_id)
        entry.failures = 0
        entry.avoided_until_s = 0.0
        entry.why = ""
        self._doubts.pop(peer_id, None)

    def shown(self, peer_id: PeerId, throughput: float) -> None:
        """Note that the peer had at least this throughput, in positions a second through one block."""
        entry = self._touch(peer_id)
        entry.shown_throughput = max(entry.shown_throughput, throughput)

    def shown_throughputs(self) -> dict[PeerId, float]:
        """The least throughput that each peer has shown, as far as any was noted."""
        return {peer: entry.shown_throughput for peer, entry in self._entries.items() if entry.shown_throughput}

    def forgive(self) -> None:
        """Take back recent failures, because our own process slept. A doubted peer still has to answer."""
        for entry in self._entries.values():
            if entry.avoided_until_s > self._now():
                entry.avoided_until_s = self._now()
                entry.failures -= 1

    def is_avoided(self, peer_id: PeerId) -> bool:
        """Whether to leave the peer out of a chain now."""
        entry = self._entries.get(peer_id)
        is_late = entry is not None and self._now() < entry.avoided_until_s
        return peer_id in self._doubts or is_late or self.convictions.get(peer_id) is not None

    def why_avoided(self, peer_id: PeerId) -> str:
        """The reason of the peer's last failure; "" if there is none, or it is not avoided."""
        if (conviction := self.convictions.get(peer_id)) is not None:
            return f"{peer_id} is avoided for a day: {conviction.why}"
        entry = self._entries.get(peer_id)
        return entry.why if entry is not None and self.is_avoided(peer_id) else ""

    def avoidance(self) -> list[Avoidance]:
        """The peers that are avoided now, with the reasons, those that are avoided for longest first."""
        found = [self._avoidance_of(peer_id) for peer_id in self.avoided()]
        return sorted(found, key=lambda one: (one.for_s, one.failures), reverse=True)

    def _avoidance_of(self, peer_id: PeerId) -> Avoidance:
        entry = self._entries.get(peer_id) or _Entry()
        return Avoidance(peer_id, max(0.0, entry.avoided_until_s - self._now()), entry.failures, entry.why)

    def avoided(self) -> frozenset[PeerId]:
        """All peers to leave out of a chain now."""
        now = self._now()
        late = frozenset(peer_id for peer_id, entry in self._entries.items() if now < entry.avoided_until_s)
        return late | self._doubts.keys() | self.convictions.peers()

    def reached(self, peer_id: PeerId, network: str) -> None:
        """Note that we dialled the peer and found it, in this public network ("" for none)."""
        self._touch(peer_id).network = network

    def standing(self, peer_id: PeerId) -> Standing:
        """What the peer's word weighs."""
        entry = self._entries.get(peer_id)
        if entry is None:
            return unknown(peer_id)
        is_reached = entry.network is not None
        absent = not is_reached and not entry.has_served and self.is_avoided(peer_id)
        return Standing(entry.network or peer_id, entry.has_served, is_reached, absent)

    # Proof.

    @property
    def asks_at_s(self) -> float:
        """When a peer is to be asked next; inf if none is."""
        return min((doubt.ask_at_s for doubt in self._doubts.values()), default=float("inf"))

    def take_doubted(self) -> list[PeerId]:
        """The peers to ask now whether they are there. The caller reports `answered` or `unanswered` for each."""
        now = self._now()
        due = [peer_id for peer_id, doubt in self._doubts.items() if doubt.ask_at_s <= now]
        for peer_id in due:
            self._doubts[peer_id].ask_at_s = float("inf")
            self._doubts[peer_id].asked_at_s = now
        return due

    def answered(self, peer_id: PeerId) -> None:
        """Note that the peer answered. If it was unreachable before, its record is clean; else it waits for its time's
        end.
        """
        doubt = self._doubts.pop(peer_id, None)
        if doubt is not None and doubt.unanswered:
            self._touch(peer_id).avoided_until_s = self._now()

    def unanswered(self, peer_id: PeerId, why: str = "") -> None:
        """Note that the peer cannot be reached: ask it again, after a delay that doubles."""
        if (doubt := self._doubts.get(peer_id)) is not None:
            delay_s = min(FIRST_AVOIDANCE_S * 2.0**doubt.unanswered, MAX_AVOIDANCE_S)
            doubt.unanswered += 1
            self._touch(peer_id).why = why
            doubt.ask_at_s = self._now() + delay_s if doubt.unanswered < MAX_UNANSWERED else float("inf")
            self._tell_of_doubt()

    def announced(self, peer_id: PeerId, seq: int) -> None:
        """Note a new announcement of the peer, with number `seq`. A peer that could not be reached may be back: ask it
        soon.
        """
        doubt = self._doubts.get(peer_id)
        if doubt is None or seq <= doubt.announced_seq:
            return
        doubt.announced_seq = seq
        self._ask_soon(doubt)

    def wanted(self, peer_id: PeerId) -> None:
        """Note that no other peer serves what this one announces: if it could not be reached, ask it soon, since it may
        be back.
        """
        if (doubt := self._doubts.get(peer_id)) is not None:
            self._ask_soon(doubt)

    def _tell_of_doubt(self) -> None:
        for listener in self.on_doubt:
            listener()

    def _ask_soon(self, doubt: _Doubt) -> None:
        is_being_asked = doubt.ask_at_s == float("inf") and doubt.unanswered < MAX_UNANSWERED
        if doubt.unanswered and not is_being_asked:
            doubt.ask_at_s = min(doubt.ask_at_s, max(self._now(), doubt.asked_at_s + MIN_ASKING_S))
            self._tell_of_doubt()

    @property
    def has_doubts(self) -> bool:
        """Whether any peer is doubted; if none is, `announced` has no effect."""
        return bool(self._doubts)

    # Distance.

    def measured(self, peer_id: PeerId, rtt_s: float, *, gain: float = RTT_GAIN) -> None:
        """Note a round trip to the peer that took `rtt_s` seconds; `gain` is its weight in the smoothed time.

        Raises ValueError if `rtt_s` is negative or not finite.
        """
        if not 0 <= rtt_s < float("inf"):
            raise ValueError(f"a round trip takes a finite time of at least 0 s, not {rtt_s}")
        entry = self._touch(peer_id)
        entry.rtt_s = rtt_s if entry.rtt_s is None else entry.rtt_s + gain * (rtt_s - entry.rtt_s)

    def rtt_s(self, peer_id: PeerId) -> float | None:
        """The smoothed round-trip time in seconds; None if it was never measured."""
        entry = self._entries.get(peer_id)
        return None if entry is None else entry.rtt_s

    def rtts_s(self) -> dict[PeerId, float]:
        """All measured round-trip times, in seconds."""
        return {peer_id: entry.rtt_s for peer_id, entry in self._entries.items() if entry.rtt_s is not None}

    def _touch(self, peer_id: PeerId) -> _Entry:
        entry = self._entries.pop(peer_id, None) or _Entry()
        self._entries[peer_id] = entry
        if len(self._entries) > MAX_PEERS:
            forgotten = next(iter(self._entries))
            del self._entries[forgotten]
            self._doubts.pop(forgotten, None)
        return entry

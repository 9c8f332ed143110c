"""Decides which peers a session or a training chain asks, which it leaves out, and when it gives up.

A peer may be full, unfit for what is wanted, have broken a promise, or have done no wrong. `fault_of` says which, and a
table (`Rules`) what that means for sessions and for training. Nothing here waits or sends: times are arguments, and the
answer is a value, `AskAgain`, `WaitUntil` or `GiveUp`, on which the caller acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from random import Random

from peerd.client.finding.busy_peers import BusyPeers
from peerd.client.finding.finder import Patience
from peerd.protocol.errors import (
    BadResult,
    Evicted,
    NoChain,
    NoRoom,
    NotServed,
    Overloaded,
    PeerdError,
    PeerFault,
    RelayLost,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span

# The pause between two attempts at a chain is random, up to this, so that two clients do not collide for ever. The
# first pauses are short: a peer that died may have a replacement that is being announced at this moment.
FIRST_RETRY_S = 0.1
RETRY_S = 1.0
# How long a session leaves out a peer that it overtook, or that its neighbour could not reach.
AVOIDED_S = 30.0
# After this many failures in a row without an answer, trying further is useless.
MAX_FAULTS_WITHOUT_ANSWER = 8


class Fault(Enum):
    """What a refusal says of the peer that refused."""

    ABSENCE = auto()
    """None: the client was away for too long, or the relay between them is."""
    FULL = auto()
    """It has no room now."""
    UNFIT = auto()
    """It cannot do what is wanted, or its blocks give NaN or infinity."""
    BROKEN_PROMISE = auto()
    """It does not answer, or not as the protocol demands."""
    OURS = auto()
    """None: what is wanted is wrong, it says, and every other peer would refuse it too."""


def fault_of(error: PeerdError) -> Fault:
    """Whose fault a refusal is."""
    match error:
        case Evicted() | RelayLost():
            return Fault.ABSENCE
        case Overloaded():
            return Fault.FULL
        case NotServed() | UnsupportedFeature() | BadResult():
            return Fault.UNFIT
        case PeerFault():
            return Fault.BROKEN_PROMISE
        case _:
            return Fault.OURS


@dataclass(frozen=True, slots=True)
class Rules:
    """What faults mean.

    blamed: every session of this process leaves the peer out for a while. set_aside: this search asks it again only
    where nobody else is left. barred: it is not asked again at all. believed: the request fails at once.
    waits_for_room: a peer without room may have some later.
    """

    blamed: frozenset[Fault]
    set_aside: frozenset[Fault]
    barred: frozenset[Fault]
    believed: frozenset[Fault]
    waits_for_room: bool


# A peer that refuses what it announced broke a promise, too. What one peer says of our request, one of another network
# must say too.
SESSION_RULES = Rules(
    blamed=frozenset({Fault.UNFIT, Fault.BROKEN_PROMISE}),
    set_aside=frozenset({Fault.ABSENCE, Fault.UNFIT, Fault.BROKEN_PROMISE, Fault.OURS}),
    barred=frozenset(),
    believed=frozenset(),
    waits_for_room=True,
)
# No announcement says whether a peer trains, nor how large a pass may be: both stay as they are. A peer that ended an
# idle lane opens another at once.
TRAINING_RULES = Rules(
    blamed=frozenset({Fault.BROKEN_PROMISE}),
    set_aside=frozenset({Fault.OURS}),
    barred=frozenset({Fault.UNFIT}),
    believed=frozenset(),
    waits_for_room=False,
)


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Look for others, at once.

    is_blamed: the finder is to leave the peer out, for every session. is_doubted: the peer says that the request is
    wrong, which others must say, too, before it is believed.
    """

    is_blamed: bool = False
    is_doubted: bool = False


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Look again then. is_last_resort: also among peers that were left out without proof of a fault."""

    time: float
    is_last_resort: bool = True


@dataclass(frozen=True, slots=True)
class GiveUp:
    """There is no use in trying on, and this is why."""

    error: PeerdError


class Candidates:
    """What one session, or one training chain, holds for or against peers as long as it lives."""

    def __init__(self, rules: Rules, patience: Patience, rng: Random) -> None:
        self.rules = rules
        self.patience = patience
        self.rng = rng
        self._barred: set[PeerId] = set()
        self._avoided_until: dict[PeerId, float] = {}

    def __repr__(self) -> str:
        return f"<Candidates barred={len(self._barred)} avoided={len(self._avoided_until)}>"

    def search(self, now: float, *, is_first: bool = False) -> Search:
        """Begin to look for peers. `is_first`: for a session that has computed nothing yet."""
        first_s = self.patience.first_busy_s if is_first else None
        return Search(self, now, self.patience.busy_s if first_s is None else first_s)

    def avoid(self, peer: PeerId, now: float) -> None:
        """Leave a peer out for a while, without blame."""
        self._avoided_until[peer] = now + AVOIDED_S

    def avoided(self, now: float) -> frozenset[PeerId]:
        """The peers that are left out without blame now."""
        return frozenset(peer for peer, until in self._avoided_until.items() if now < until)

    def forgive(self) -> None:
        """Ask avoided peers again: better a slow peer than none."""
        self._avoided_until.clear()

    def bar(self, peer: PeerId) -> None:
        """Never ask a peer again."""
        self._barred.add(peer)

    @property
    def barred(self) -> frozenset[PeerId]:
        """The peers that are not asked again."""
        return frozenset(self._barred)


class Search:
    """The search for peers to one hole of a chain, from the time at which it was missed."""

    def __init__(self, candidates: Candidates, now: float, busy_s: float) -> None:
        self.busy = BusyPeers(candidates.rng)
        self._busy_s = busy_s
        self._candidates = candidates
        self._began = now
        self._set_aside: set[PeerId] = set()
        self._pause_s = FIRST_RETRY_S

    def __repr__(self) -> str:
        return f"<Search since {self._began:.1f} {self.busy!r} set_aside={len(self._set_aside)}>"

    def exclude(self, now: float) -> frozenset[PeerId]:
        """The peers not to ask now."""
        mine = self._candidates
        return self.busy.away(now) | self._set_aside | mine.avoided(now) | mine.barred

    def left_s(self, now: float) -> float:
        """How long it may still wait for peers that are full."""
        return self._busy_s - (now - self._began)

    def refused(
        self, peer: PeerId, error: PeerdError, blocks: Span, *, asked_at: float, now: float
    ) -> AskAgain | GiveUp:
        """A peer refused, when asked at a time for blocks."""
        fault, rules = fault_of(error), self._candidates.rules
        if fault in rules.believed:
            return GiveUp(error)
        if isinstance(error, Overloaded) and fault is Fault.FULL:
            self.busy.refused(peer, error, now)
            if self.left_s(asked_at) <= 0:
                return GiveUp(self.busy.error(blocks, asked_at - self._began))
        if fault in rules.set_aside:
            self._set_aside.add(peer)
        if fault in rules.barred:
            self._candidates.bar(peer)
        return AskAgain(is_blamed=fault in rules.blamed, is_doubted=fault is Fault.OURS)

    def found_nobody(
        self,
        missing: NoChain,
        blocks: Span,
        *,
        asked_at: float,
        now: float,
        all_busy: bool,
        may_return: bool,
        answer: PeerdError | None = None,
    ) -> WaitUntil | GiveUp:
        """There is no chain for blocks, of peers that may be asked.

        asked_at: since when it tried; one peer that hangs may have taken all the time that there was.
        all_busy: whether the blocks are served, and peers are full. may_return: whether the finder leaves peers out
        that may do better. answer: what peers said of the request, which stands where no other peer is left.
        GiveUp has `missing` itself where others may know more of why.
        """
        mine, waited_s = self._candidates, asked_at - self._began
        is_late = waited_s >= mine.patience.missing_s
        if answer is not None and (not may_return or is_late):
            # Nobody is left who may do better, nor comes back in a while.
            return GiveUp(answer)
        if all_busy and not mine.rules.waits_for_room and isinstance(self.busy.last, NoRoom):
            return GiveUp(self.busy.error(blocks, waited_s))
        if is_late and not all_busy:
            return GiveUp(missing)
        if self.left_s(asked_at) <= 0:
            return GiveUp(self.busy.error(blocks, waited_s))
        if all_busy and not self._set_aside and not mine.avoided(now):
            return WaitUntil(self.busy.next_try(now, self._began + self._busy_s), is_last_resort=False)
        self._set_aside.clear()
        mine.forgive()
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, RETRY_S)
        return WaitUntil(now + pause_s * mine.rng.random())

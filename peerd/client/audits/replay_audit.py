"""Checks one hop of a session in use: other servers compute what it was sent, and sketches are compared.

Each hop tells the client sketches of what it received, so the hop before it cannot say later that it sent something
else. Another server gets the rows from the hop before the suspect, and tells sketches of what it received and computed,
under the same secret seeds. Three things are compared: what the suspect and the other server received, which must be
the same; and what both made of it, which may differ by rounding. Where it differs by more, a third server decides, and
then the suspect itself computes it again, because the hop that told what the suspect sent may have lied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from random import Random

from peerd.client.audits.audit import AuditTools, End, Outcome
from peerd.client.audits.open_case import Claims, OpenCase
from peerd.client.audits.others import Others, pairs_of
from peerd.client.audits.prefills import Unfinished
from peerd.client.audits.replays import Boundaries, Replays
from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.opener import ChainOpener, Terms
from peerd.compute.audits.distance import FIRST_POSITION, MIN_POSITIONS, distance
from peerd.compute.audits.sketches import are_same, sketched_limit
from peerd.protocol.identity import PeerId
from peerd.routing.audits.verdict import Verdict, judge
from peerd.routing.chains.chain import Hop

UNLIKE = "two servers say that they were sent different values"


class ReplayAudit:
    """The check of the hop number `at` of an open session."""

    def __init__(
        self, case: OpenCase, at: int, terms: Terms, tools: AuditTools, replays: Replays, opener: ChainOpener
    ) -> None:
        self._case = case
        self._at = at
        self._terms = terms
        self._tools = tools
        self._others: Others = tools.others
        self._replays = replays
        self._opener = opener

    def __repr__(self) -> str:
        return f"<ReplayAudit of hop {self._at} in {self._case}>"

    async def run(self) -> Outcome:
        """Carry it out. Sets no deadline."""
        await self._others.look()
        try:
            claims = self._case.claims(self._at, self._opener.new_seed())
            if int((claims.positions >= FIRST_POSITION).sum()) < MIN_POSITIONS:
                return Outcome(End.SKIPPED, "too few positions")
            return await self._check(claims)
        except Unfinished as error:
            return Outcome(End.UNFINISHED, str(error))

    async def _check(self, claims: Claims) -> Outcome:
        suspect = claims.suspect.hop
        chain = [control.hop.peer_id for control in claims.source.chain.controls]
        if (auditor := self._other(suspect, chain)) is None:
            return Outcome(End.SKIPPED, "no other server of the same blocks in another network")
        if self._limit(suspect, auditor) is None:
            return Outcome(End.SKIPPED, "no limit is known for these numerics")
        second = await self._replay(claims, auditor)
        if not self._got_the_same(claims, second):
            return self._disputed((claims.source.before, suspect, auditor), UNLIKE)
        apart = self._apart(claims, second)
        if apart <= self._limit_of(suspect, auditor):
            return Outcome(End.AGREED, f"{apart:.3g} apart, honest ones up to {self._limit_of(suspect, auditor):.3g}")
        why = f"what a hop sent is {apart:.3g} away from what another server makes of its input"
        third = self._other(suspect, [*chain, auditor.peer_id])
        if third is None:
            return self._disputed((suspect, claims.witness, auditor), f"{why}; there is no third server")
        return await self._decide(claims, (auditor, second), third, why)

    async def _decide(self, claims: Claims, other: tuple[Hop, Boundaries], third: Hop, why: str) -> Outcome:
        """Let a third server decide between the suspect and another server."""
        auditor, second = other
        suspect = claims.suspect.hop
        found = await self._replay(claims, third)
        if not self._got_the_same(claims, found):
            return self._disputed((claims.source.before, suspect, claims.witness, auditor, third), f"{why}; {UNLIKE}")
        told = (
            self._apart(claims, found) > self._limit_of(suspect, third),
            self._differ(claims, second, found) > self._limit_of(auditor, third),
        )
        match judge(auditor_differs=True, third=told):
            case Verdict.AUDITOR:
                return self._convicted(auditor.peer_id, f"{why}, and that server from a third")
            case Verdict.SUSPECT if claims.witness is None:
                return self._convicted(suspect.peer_id, why)
            case Verdict.SUSPECT:
                return await self._ask_again(claims, other, why)
            case _:
                return self._disputed((suspect, claims.witness, auditor, third), f"{why}; a third does not decide")

    async def _ask_again(self, claims: Claims, other: tuple[Hop, Boundaries], why: str) -> Outcome:
        """The hop behind the suspect may have lied about what it got: so see what the suspect computes now."""
        suspect, auditor = claims.suspect.hop, other[0]
        try:
            again = await self._replay(claims, suspect, gives_way=False)
        except Unfinished as error:
            return self._disputed((suspect, claims.witness), f"{why}; it was not computed again: {error}")
        if self._differ(claims, again, other[1]) > self._limit_of(suspect, auditor):
            return self._convicted(suspect.peer_id, why)
        return self._disputed((suspect, claims.witness), f"{why}; computed again, it is not")

    async def _replay(self, claims: Claims, hop: Hop, *, gives_way: bool = True) -> Boundaries:
        found = await self._replays.compute(claims.source, hop, gives_way=gives_way)
        self._case.check_unchanged(claims)
        return found

    @staticmethod
    def _got_the_same(claims: Claims, found: Boundaries) -> bool:
        return claims.received is None or are_same(claims.received, found.received)

    @staticmethod
    def _apart(claims: Claims, found: Boundaries) -> float:
        """How far what left the suspect is from what another server made of the same input."""
        kept = claims.positions >= FIRST_POSITION
        at = claims.positions[kept]
        return distance(found.entered[at], claims.left[kept], found.left[at])

    @staticmethod
    def _differ(claims: Claims, one: Boundaries, other: Boundaries) -> float:
        at = claims.positions[claims.positions >= FIRST_POSITION]
        return distance(other.entered[at], one.left[at], other.left[at])

    def _other(self, suspect: Hop, than: Collection[PeerId]) -> Hop | None:
        """One server of the suspect's blocks that shares nothing with these peers."""
        terms, busy = self._terms, self._tools.in_use()
        hops = self._others.chain(
            suspect.span, terms.size.max_length, terms.adapter_need, without=than, busy=busy, like=(suspect,)
        )
        return hops[0] if hops is not None and len(hops) == 1 else None

    def _limit(self, one: Hop, other: Hop) -> float | None:
        is_whole = one.span == self._case.session.spec.blocks
        limit = self._tools.thresholds.limit(pairs_of((one,), (other,)), is_whole=is_whole, blocks=len(one.span))
        return None if limit is None else sketched_limit(limit)

    def _limit_of(self, one: Hop, other: Hop) -> float:
        """As `_limit`; without a limit nothing is too far apart."""
        limit = self._limit(one, other)
        return float("inf") if limit is None else limit

    def _convicted(self, peer: PeerId, why: str) -> Outcome:
        self._tools.suspects.clear(self._others.voice(peer))
        return Outcome(End.CONVICTED, why, (peer,))

    def _disputed(self, hops: Iterable[Hop | ControlStream | None], why: str) -> Outcome:
        """Remember these, one of which has lied. If one had a part in several that have nothing else in common, it
        lied.
        """
        peers = {hop.hop.peer_id if isinstance(hop, ControlStream) else hop.peer_id for hop in hops if hop is not None}
        voice = self._tools.suspects.note(map(self._others.voice, peers))
        if voice is None:
            return Outcome(End.UNEXPLAINED, why)
        convicted = tuple(peer for peer in sorted(peers) if voice == self._others.voice(peer))
        return Outcome(End.CONVICTED, f"{why}; it alone had a part in several such audits", convicted)


def hop_to_check(chance: float, probability: float, hops: int) -> int | None:
    """Which of a chain's hops a session checks, so that each is checked with this probability; None: none. At most
    one is checked.

    chance: a random number from 0 to 1 that was drawn when the session began.
    """
    if probability * hops >= 1:
        return int(chance * hops)
    at = int(chance / probability) if probability else hops
    return at if at < hops else None


def positions_before(random: Random) -> int:
    """After how many positions a hop is checked: nobody knows them before."""
    return random.randint(FIRST_CHECK, LAST_CHECK)


# Fewer positions say little; of more, the replay costs more than it says. A session that ends before is not checked.
FIRST_CHECK = 64
LAST_CHECK = 256

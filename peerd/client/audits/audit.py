"""One audit: has other servers compute an answer again and, where they differ, finds out who computed something else.

First the whole row, prompt and answer, goes as one prefill through a chain of other servers, and the last hidden states
are compared. If they are further apart than honest servers can be, the border is searched before which both chains
agree and behind which they differ. Then three servers compute that part for the same input: the one of the answer, the
one of the audit, and a third.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from peerd.client.audits.case import Case
from peerd.client.audits.others import InUse, Others, pairs_of, part_of
from peerd.client.audits.prefills import Prefills, Unfinished
from peerd.compute.audits.distance import FIRST_POSITION, distance
from peerd.compute.audits.thresholds import Thresholds
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.audits.bisection import Bisection
from peerd.routing.audits.suspects import Suspects
from peerd.routing.audits.verdict import Verdict, judge
from peerd.routing.chains.chain import Hop


class End(Enum):
    """How an audit ended."""

    AGREED = "agreed"
    """Other servers computed the same."""
    CONVICTED = "convicted"
    """They did not, and it is known who lied."""
    UNEXPLAINED = "unexplained"
    """They did not, and it is not known who lied: a part in several such audits convicts."""
    SKIPPED = "skipped"
    """There are no other servers to ask, or nothing is known about how honest ones of their kind differ."""
    UNFINISHED = "unfinished"
    """Servers were full, gone or needed by the user."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an audit ended, and why; `convicted` are peers that computed something else."""

    end: End
    why: str
    convicted: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True)
class AuditTools:
    """What the audits of one model share."""

    others: Others
    prefills: Prefills
    thresholds: Thresholds
    suspects: Suspects
    in_use: InUse


class Audit:
    """The audit of one answer."""

    def __init__(self, case: Case, tools: AuditTools) -> None:
        self._case = case
        self._tools = tools
        self._others = tools.others

    def __repr__(self) -> str:
        return f"<Audit of {self._case.blocks}, {len(self._case.positions)} results>"

    async def run(self) -> Outcome:
        """Carry it out. Sets no deadline."""
        case, others = self._case, self._others
        await others.look()
        if (suspects := others.hops(case.chain)) is None:
            return Outcome(End.SKIPPED, "a server of the answer has left")
        if (auditors := self._chain_of_others(case.blocks, case.peers, suspects)) is None:
            return Outcome(End.SKIPPED, "no other servers in other networks")
        try:
            apart = await self._apart(suspects, auditors)
        except Unfinished as error:
            return Outcome(End.UNFINISHED, str(error))
        limit = self._limit(suspects, auditors)
        if limit is None:
            return Outcome(End.SKIPPED, "no limit is known for these numerics")
        if apart <= limit:
            return Outcome(End.AGREED, f"{apart:.3g} apart, honest ones up to {limit:.3g}")
        why = f"the results of a chain are {apart:.3g} away from those of others, honest ones up to {limit:.3g}"
        try:
            return await self._search(suspects, auditors, why)
        except Unfinished as error:
            return self._unexplained(suspects, auditors, f"{why}; the search ended early: {error}")

    async def _apart(self, suspects: Sequence[Hop], auditors: Sequence[Hop]) -> float:
        """How far the answer is away from what the auditors compute."""
        case = self._case
        first = case.positions[0]
        theirs = await self._compute(auditors, case.inputs, first)
        positions = torch.tensor(case.positions)
        return distance(case.inputs[positions], case.results, theirs[positions - first])

    async def _search(self, suspects: Sequence[Hop], auditors: Sequence[Hop], why: str) -> Outcome:
        """Find the hop whose result differs, and let a third server decide."""
        inputs, start = self._case.inputs, self._case.blocks.start
        # The auditors' result behind so many hops of the suspects, as far as both agree.
        agreed = inputs
        bisection = Bisection(len(suspects))
        while (hops := bisection.question) is not None:
            part = suspects[:hops]
            same = part_of(auditors, Span(start, part[-1].span.end))
            mine, theirs = await self._compute(part, inputs), await self._compute(same, inputs)
            differs = self._differ(inputs, (part, mine), (same, theirs))
            bisection.answer(hops, differs=differs)
            agreed = agreed if differs else theirs
        suspect = suspects[bisection.found]
        same = part_of(auditors, suspect.span)
        verdict = await self._try((suspect,), same, agreed)
        if verdict is Verdict.SUSPECT:
            return self._convicted([suspect.peer_id], why)
        if verdict is Verdict.AUDITOR and len({hop.peer_id for hop in same}) == 1:
            return self._convicted([same[0].peer_id], why)
        if verdict is Verdict.NOBODY:
            return self._unexplained(suspects, auditors, f"{why}; asked again, they agree")
        return self._unexplained((suspect,), same, why)

    async def _try(self, suspect: Sequence[Hop], auditor: Sequence[Hop], inputs: torch.Tensor) -> Verdict:
        """Compare three servers of the same blocks for the same input."""
        first = suspect, await self._compute(suspect, inputs)
        second = auditor, await self._compute(auditor, inputs)
        if not self._differ(inputs, first, second):
            return judge(auditor_differs=False, third=None)
        known = [hop.peer_id for hop in (*suspect, *auditor)]
        hops = self._chain_of_others(suspect[0].span, known, suspect)
        if hops is None:
            return judge(auditor_differs=True, third=None)
        third = hops, await self._compute(hops, inputs)
        told = self._differ(inputs, first, third), self._differ(inputs, second, third)
        return judge(auditor_differs=True, third=told)

    def _differ(
        self,
        inputs: torch.Tensor,
        one: tuple[Sequence[Hop], torch.Tensor],
        other: tuple[Sequence[Hop], torch.Tensor],
    ) -> bool:
        """Whether two results for all of a row's positions are further apart than honest ones can be."""
        limit = self._limit(one[0], other[0])
        kept = slice(FIRST_POSITION, None)
        return limit is not None and distance(inputs[kept], one[1][kept], other[1][kept]) > limit

    def _limit(self, one: Sequence[Hop], other: Sequence[Hop]) -> float | None:
        is_whole = len(one) > 1 or one[0].span == self._case.blocks
        blocks = sum(len(hop.span) for hop in one)
        return self._tools.thresholds.limit(pairs_of(one, other), is_whole=is_whole, blocks=blocks)

    def _chain_of_others(self, blocks: Span, than: Iterable[PeerId], like: Sequence[Hop]) -> tuple[Hop, ...] | None:
        case, in_use = self._case, self._tools.in_use()
        length = case.terms.size.max_length
        need = case.terms.adapter_need
        return self._others.chain(blocks, length, need, without=than, busy=in_use, like=like)

    async def _compute(self, hops: Sequence[Hop], inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
        return await self._tools.prefills.compute(hops, inputs, self._case.terms, first)

    def _convicted(self, peers: Iterable[PeerId], why: str) -> Outcome:
        peers = tuple(peers)
        for peer in peers:
            self._tools.suspects.clear(self._others.voice(peer))
        return Outcome(End.CONVICTED, why, peers)

    def _unexplained(self, suspects: Sequence[Hop], auditors: Sequence[Hop], why: str) -> Outcome:
        """Remember who had a part in it. If one had a part in several that have nothing else in common, it lied."""
        peers = {hop.peer_id for hop in (*suspects, *auditors)}
        voice = self._tools.suspects.note(map(self._others.voice, peers))
        if voice is None:
            return Outcome(End.UNEXPLAINED, why)
        convicted = tuple(peer for peer in sorted(peers) if voice == self._others.voice(peer))
        return Outcome(End.CONVICTED, f"{why}; it alone had a part in several such audits", convicted)

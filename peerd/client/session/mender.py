"""Finds and opens hops for the holes of a session's chain.

`candidates` decides whom to ask, whom to leave out and when to give up; `refusals` which of what hops say of our
requests to believe. This asks the finder and the opener, and waits.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from peerd.client.finding.candidates import SESSION_RULES, AskAgain, Candidates, GiveUp, Search, WaitUntil
from peerd.client.finding.finder import ChainFinder, Patience
from peerd.client.finding.refusals import Refusals
from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.opener import ChainOpener, HopRefused, Terms
from peerd.protocol.errors import NoChain, Overloaded, PeerdError, UnsupportedFeature
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.chain import Hop
from peerd.routing.directory.directory import CACHE_S

# The time for dialling and the handshake, in addition to the wait for memory. It is shorter in mid-answer, while a user
# waits for a token.
OPEN_MARGIN_S = 10.0
MEND_MARGIN_S = 3.0


class NumbersUsedUp(Exception):
    """The session has no numbers left for new hops. Only a new session has some."""


@dataclass(frozen=True, slots=True)
class SessionTools:
    """What all sessions of one model share: the finder, the opener and the random source."""

    finder: ChainFinder
    opener: ChainOpener
    rng: random.Random


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a session needs: `blocks`, whose hidden states are `width` wide, on these terms."""

    blocks: Span
    width: int
    terms: Terms
    patience: Patience = field(default_factory=Patience)


class ChainMender:
    """Fills the holes of one session's chain."""

    def __init__(self, tools: SessionTools, spec: SessionSpec) -> None:
        self._finder = tools.finder
        self._opener = tools.opener
        self._terms = spec.terms
        self._end = spec.blocks.end
        self.candidates = Candidates(SESSION_RULES, spec.patience, tools.rng)
        self._has_answered = False
        #: What hops said of what is asked now: that it is wrong, or overflows. Others may do better; where there are
        #: none, that is the answer.
        self.refusals = Refusals(tolerated=0, voice=tools.opener.voice, now=trio.current_time)
        #: What hops said about their caches, or did against what they had said. An honest hop may do this once.
        self.lapses = Refusals(tolerated=1, voice=tools.opener.voice, now=trio.current_time)

    def __repr__(self) -> str:
        return f"<ChainMender {self.candidates!r}>"

    def answered(self, chain: LiveChain) -> None:
        """Note that the chain has answered. Peers that refused what it did, or were left out for that, are blamed."""
        self._has_answered = True
        for kind in (self.refusals, self.lapses):
            if kind:
                for peer in kind.settle([control.hop.peer_id for control in chain.controls]):
                    self._finder.failed(peer)

    async def fill(self, chain: LiveChain, hole: Span) -> list[ControlStream]:
        """Open hops over a hole, within the limits of patience, which are longer if peers are only busy.

        Raises NoChain, which names all missing blocks; Overloaded; CallerError or BadResult if other peers refuse too,
        or there are no others; NumbersUsedUp, only if other hops are open.
        """
        search = self.candidates.search(trio.current_time(), is_first=not self._has_answered)
        # Why the last peer that is not just full refused.
        refusal: HopRefused | None = None
        while True:
            asked_at = trio.current_time()
            try:
                return await self._try(chain, hole, search.exclude(asked_at), search)
            except NoChain as missing:
                all_busy = bool(search.busy.away(trio.current_time())) and await self._is_served(chain, hole)
                match search.found_nobody(
                    missing,
                    hole,
                    asked_at=asked_at,
                    now=trio.current_time(),
                    all_busy=all_busy,
                    may_return=bool(self._finder.avoided()),
                    answer=self.refusals.error if self.refusals else None,
                ):
                    case WaitUntil(time, is_last_resort):
                        if is_last_resort:
                            # Better a doubtful peer than none.
                            self.lapses.clear()
                        await trio.sleep_until(time)
                    case GiveUp(error) if error is missing:
                        raise await self._missing(chain, missing, refusal) from missing
                    case GiveUp(error):
                        raise error from missing
            except HopRefused as refused:
                # Other peers can be asked at once.
                self._note(search, refused, hole, asked_at)
                if self.refusals.are_believed:
                    raise refused.error from refused
                if not isinstance(refused.error, Overloaded):
                    refusal = refused

    async def overtake(self, chain: LiveChain, span: Span, slow: Iterable[PeerId]) -> list[ControlStream] | None:
        """Open hops over blocks whose hops are slow, leaving those out; None where nobody else can be had now."""
        now = trio.current_time()
        search = self.candidates.search(now)
        try:
            return await self._try(chain, span, search.exclude(now) | set(slow), search)
        except (NoChain, NumbersUsedUp):
            return None
        except HopRefused as refused:
            self._note(search, refused, span, now)
            return None

    def _note(self, search: Search, refused: HopRefused, blocks: Span, asked_at: float) -> None:
        """Remember a refusal. Raises it, where there is no use in asking others."""
        peer = refused.hop.peer_id
        match search.refused(peer, refused.error, blocks, asked_at=asked_at, now=trio.current_time()):
            case GiveUp(error):
                raise error from refused
            case AskAgain(is_doubted=True):
                self.refusals.note(refused.error, peer)
            case AskAgain(is_blamed=True):
                self._finder.failed(peer)

    async def _try(
        self, chain: LiveChain, span: Span, exclude: Collection[PeerId], search: Search
    ) -> list[ControlStream]:
        hops = await self._find(chain, span, {*exclude, *self.refusals.left_out(), *self.lapses.left_out()})
        if not chain.has_numbers(len(hops)):
            # Every attempt takes some numbers, and in a full swarm there are many attempts.
            if chain.controls:
                raise NumbersUsedUp
            chain.renew(self._opener.new_session())
        margin_s = MEND_MARGIN_S if chain.controls else OPEN_MARGIN_S
        alone = len(hops) == 1 and not chain.controls
        left_s = search.left_s(trio.current_time())
        terms = replace(self._terms, timeout_ms=search.busy.timeout_ms(self._terms.timeout_ms, left_s, alone=alone))
        return await self._opener.open(chain, chain.raise_epoch(), hops, terms, margin_s)

    async def _is_served(self, chain: LiveChain, span: Span) -> bool:
        """Whether any peers serve these blocks, counting busy and failed ones."""
        try:
            await self._find(chain, span, ())
        except NoChain:
            return False
        return True

    async def _find(self, chain: LiveChain, span: Span, exclude: Collection[PeerId]) -> Sequence[Hop]:
        between = (_peer(chain.before(span.start)), _peer(chain.after(span.end))) if chain.controls else None
        terms = self._terms
        find = partial(self._finder.find, span, tokens=terms.tokens, adapter=terms.adapter_need, between=between)
        found = await find(exclude=exclude)
        if terms.head and span.end == self._end and not found.hops[-1].offer.record.head:
            # Better another last hop, which draws tokens, than to draw them here.
            with suppress(NoChain):
                found = await find(exclude={*exclude, *await self._without_head()})
        return found.hops

    async def _without_head(self) -> set[PeerId]:
        """The peers that serve the last block and draw no tokens."""
        offers = [each for each in await self._finder.offers(CACHE_S) if each.span.end == self._end]
        return {each.peer_id for each in offers} - {each.peer_id for each in offers if each.record.head}

    async def _missing(self, chain: LiveChain, found: NoChain, refusal: HopRefused | None) -> PeerdError:
        """The error that names the missing blocks of all holes, with the reason if it is known."""
        if refusal is not None and isinstance(refusal.error, UnsupportedFeature):
            return refusal.error
        if len(chain.holes) < 2:
            return NoChain(f"{found}: {refusal}", found.missing) if refusal is not None else found
        missing = set(found.missing)
        for hole in chain.holes:
            try:
                await self._find(chain, hole, set())
            except NoChain as other:
                missing |= set(other.missing)
        spans = tuple(sorted(missing))
        return NoChain(f"no reachable peer serves blocks {', '.join(f'{start}:{end}' for start, end in spans)}", spans)


def _peer(control: ControlStream | None) -> PeerId | None:
    return None if control is None else control.hop.peer_id

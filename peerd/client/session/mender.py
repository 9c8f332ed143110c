"""Finds and opens hops for the holes of a session's chain, and decides which peers not to ask again.

There are three reasons to leave a peer out. A peer that broke a promise is reported to the finder, and all sessions
leave it out. A busy peer is left out for a time that grows (`busy_peers.py`). A peer that was overtaken, or that its
neighbour cannot reach, has done nothing wrong: only this session leaves it out, for AVOIDED_S.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import trio

from peerd.client.finding.finder import RETRY_S, ChainFinder, Patience
from peerd.client.session.busy_peers import BusyPeers
from peerd.client.session.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.opener import ChainOpener, HopRefused, Terms
from peerd.client.session.refusals import Refusals
from peerd.protocol.errors import NoChain, NotServed, Overloaded, PeerdError, PeerFault, UnsupportedFeature
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.chain import Hop

# The first pauses are short: a peer that died may have a replacement that is being announced at this moment.
FIRST_RETRY_S = 0.1
# The time for dialling and the handshake, in addition to the wait for memory. It is shorter in mid-answer, while a user
# waits for a token.
OPEN_MARGIN_S = 10.0
MEND_MARGIN_S = 3.0
# How long a session leaves out a peer that it overtook, or that its neighbour could not reach.
AVOIDED_S = 30.0


class NumbersUsedUp(Exception):
    """The session has no numbers left for new hops. Only a new session has some."""


@dataclass(frozen=True, slots=True)
class Means:
    """What all sessions of one model share: the finder, the opener and the random source."""

    finder: ChainFinder
    opener: ChainOpener
    rng: random.Random


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a session needs: `blocks`, whose hidden states are `width` wide, on these terms."""

    blocks: Span
    width: int
    terms: Terms
    patience: Patience = field(default_factory=Patience)


class ChainMender:
    """Fills the holes of one session's chain."""

    def __init__(self, means: Means, wanted: Wanted) -> None:
        self._finder = means.finder
        self._opener = means.opener
        self._rng = means.rng
        self._terms = wanted.terms
        self._patience = wanted.patience
        self._avoided_until: dict[PeerId, float] = {}
        #: Refusals of the pending steps: hops said that a step is wrong, or that its blocks overflow. Other peers may
        #: do better; if there are none, the refusal is the answer.
        self.refusals = Refusals(tolerated=0, voice=means.opener.voice, now=trio.current_time)
        #: What hops said about their caches, or did against what they had said. An honest hop may do this once.
        self.lapses = Refusals(tolerated=1, voice=means.opener.voice, now=trio.current_time)

    def __repr__(self) -> str:
        return f"<ChainMender avoids {len(self._avoided())}>"

    def avoid(self, peer: PeerId) -> None:
        """Leave a peer out for a while, without blame."""
        self._avoided_until[peer] = trio.current_time() + AVOIDED_S

    def answered(self, chain: LiveChain) -> None:
        """Note that the chain has answered. Peers that refused what it did, or were left out for that, are blamed."""
        for kind in (self.refusals, self.lapses):
            if kind:
                for peer in kind.settle([control.hop.peer_id for control in chain.controls]):
                    self._finder.failed(peer)

    async def fill(self, chain: LiveChain, hole: Span) -> list[ControlStream]:
        """Open hops over a hole, within the limits of patience, which are longer if peers are only busy.

        Raises NoChain, which names all missing blocks; Overloaded; CallerError or BadResult if other peers refuse too,
        or there are no others; NumbersUsedUp, only if other hops are open.
        """
        busy = BusyPeers(self._rng)
        # The peers that refused or did not answer, and the last refusal.
        failed: set[PeerId] = set()
        refusal: HopRefused | None = None
        started = trio.current_time()
        pause_s = FIRST_RETRY_S
        while True:
            waited = trio.current_time() - started
            try:
                exclude = busy.now() | failed | self._avoided() | self.refusals.left_out() | self.lapses.left_out()
                return await self._try(chain, hole, exclude, busy, self._patience.busy_s - waited)
            except NoChain as missing:
                if self.refusals and (not self._finder.avoided() or waited >= self._patience.missing_s):
                    # No other peer is left that may do better, and none will return soon.
                    raise self.refusals.error from missing
                all_busy = bool(busy.now()) and await self._is_served(chain, hole)
                # Checked only after a try, because a peer that hangs may have used up all the time.
                if waited >= self._patience.missing_s and not all_busy:
                    raise await self._missing(chain, missing, refusal) from missing
                if waited >= self._patience.busy_s:
                    raise busy.error(hole, waited) from missing
                if all_busy and not failed and not self._avoided():
                    await busy.wait(until_s=started + self._patience.busy_s)
                    continue
                failed.clear()
                # A slow or doubtful peer is better than none.
                self._avoided_until.clear()
                self.lapses.clear()
            except HopRefused as refused:
                # The other peers can be asked at once.
                self._blame(refused)
                if self.refusals.are_believed:
                    raise refused.error from refused
                if not isinstance(refused.error, Overloaded):
                    failed.add(refused.hop.peer_id)
                    refusal = refused
                    continue
                busy.refused(refused.hop.peer_id, refused.error)
                if waited >= self._patience.busy_s:
                    raise busy.error(hole, waited) from refused
                continue
            await trio.sleep(pause_s * self._rng.random())
            pause_s = min(2 * pause_s, RETRY_S)

    async def overtake(self, chain: LiveChain, span: Span, slow: Iterable[PeerId]) -> list[ControlStream] | None:
        """Open hops to replace slow ones, without the `slow` peers; None if no others can be had now."""
        try:
            exclude = self._avoided() | set(slow) | self.refusals.left_out() | self.lapses.left_out()
            return await self._try(chain, span, exclude, BusyPeers(self._rng), 0.0)
        except (NoChain, NumbersUsedUp):
            return None
        except HopRefused as refused:
            self._blame(refused)
            return None

    async def _try(
        self, chain: LiveChain, span: Span, exclude: Collection[PeerId], busy: BusyPeers, left_s: float
    ) -> list[ControlStream]:
        hops = await self._find(chain, span, exclude)
        if not chain.has_numbers(len(hops)):
            # Every attempt takes some numbers, and in a full swarm there are many attempts.
            if chain.controls:
                raise NumbersUsedUp
            chain.renew(self._opener.new_session())
        margin_s = MEND_MARGIN_S if chain.controls else OPEN_MARGIN_S
        alone = len(hops) == 1 and not chain.controls
        terms = replace(self._terms, timeout_ms=busy.timeout_ms(self._terms.timeout_ms, left_s, alone=alone))
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
        found = await self._finder.find(
            span, tokens=terms.tokens, exclude=exclude, adapter=terms.adapter_need, between=between
        )
        return found.hops

    def _avoided(self) -> set[PeerId]:
        now = trio.current_time()
        return {peer for peer, until in self._avoided_until.items() if now < until}

    def _blame(self, refused: HopRefused) -> None:
        """Report a peer that broke a promise to the finder; busy peers broke none. A refusal of our request is noted,
        because other peers must confirm it.
        """
        error = refused.error
        if isinstance(error, PeerFault | NotServed | UnsupportedFeature):
            self._finder.failed(refused.hop.peer_id)
        elif not isinstance(error, Overloaded):
            self.refusals.note(error, refused.hop.peer_id)

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

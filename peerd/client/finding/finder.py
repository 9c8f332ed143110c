"""Finds chains for sessions: combines the directory's offers with our own experience of the peers.

It opens nothing. A peer that fails leaves the routes of all sessions of this process at that moment, whatever its
announcements say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

import trio

from peerd.protocol.errors import (
    NoChain,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import NO_ADAPTER, AdapterNeed, choose_adapter
from peerd.routing.chains.chain import Between, Chain, ChainNeeds, plan_chain
from peerd.routing.chains.offer_table import OfferTable
from peerd.routing.chains.rules import ChainRules
from peerd.routing.directory.directory import CACHE_S, Directory
from peerd.routing.directory.offer import Offer
from peerd.routing.failures.track_record import TrackRecord

# Clients that wait for a missing server look it up again at this interval.
FRESH_S = 0.5
# How many peers that cannot be reached one message explains.
MAX_REASONS = 3


class SwarmFinder:
    """Finds chains over one model's blocks in the directory's latest view.

    position_bytes: the size of one position on the wire.
    connected: the peers to which a connection is open. Of equally good replacements one of these is taken, since it
        needs no dial.
    """

    def __init__(
        self,
        directory: Directory,
        track_record: TrackRecord,
        model: bytes,
        block_count: int,
        random: Random,
        rules: ChainRules | None = None,
        *,
        position_bytes: int = 0,
        connected: Callable[[], Collection[PeerId]] = tuple,
    ) -> None:
        self._directory = directory
        self._track_record = track_record
        self._model = model
        self._block_count = block_count
        self._random = random
        self._rules = rules or ChainRules()
        self._position_bytes = position_bytes
        self._connected = connected
        #: When a chain was last requested.
        self.used_at = float("-inf")
        #: The offers of the last lookup that the rules permit.
        self.table = OfferTable(())
        self._belief: dict[PeerId, float] = {}
        self._seen: list[Offer] = []
        self._permitted: list[Offer] = []

    async def find(
        self,
        blocks: Span,
        *,
        tokens: int,
        exclude: Collection[PeerId],
        positions: int = 1,
        adapter: AdapterNeed = NO_ADAPTER,
        requests: int = 0,
        between: Between | None = None,
    ) -> Chain:
        """The best chain over `blocks` for steps of `positions` positions, or for a training pass of `requests`
        requests.

        between: for a part that replaces another, the peers before and after it. Raises NoChain, which names the blocks
            that no peer serves.
        """
        self.used_at = trio.current_time()
        needs = ChainNeeds(tokens=tokens, positions=positions, adapter=adapter, requests=requests)
        if between is not None:
            needs = self._between(needs, between)
            # A user waits in mid-answer, and a lookup might wait for the very peer that has just died or hangs.
            with suppress(NoChain):
                return self.plan(blocks, needs, exclude)
        try:
            return await self._plan(blocks, needs, exclude, CACHE_S)
        except NoChain:
            # A missing server may have been announced since the last lookup.
            try:
                return await self._plan(blocks, needs, exclude, FRESH_S)
            except NoChain as error:
                self._look_for_the_missing(error)
                raise self._explained(error) from None

    def _look_for_the_missing(self, error: NoChain) -> None:
        """Have the peers asked that announce the missing blocks and could not be reached: the pauses between questions
        grow, and one of them may have been back for a while.
        """
        if self._track_record.has_doubts:
            for offer in self._permitted:
                if _overlaps(offer.span, error.missing):
                    self._track_record.wanted(offer.peer_id)

    def _explained(self, error: NoChain) -> NoChain:
        """The error with the reasons why the peers that announce the missing blocks cannot be reached."""
        reasons = dict.fromkeys(
            why
            for offer in self._permitted
            if _overlaps(offer.span, error.missing)
            if (why := self._track_record.why_avoided(offer.peer_id))
        )
        reasons |= dict.fromkeys(self._directory.odd_clocks(self._model, error.missing))
        if not reasons and not self._seen:
            return NoChain(
                f"{error}: no peer that we know of serves the model {self._model.hex()[:8]}. Join its swarm (bootstrap"
                " addresses); its peers have the very same files, revision and format",
                error.missing,
            )
        if not reasons:
            return error
        more = f"; and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else ""
        return NoChain(f"{error}: {'; '.join(list(reasons)[:MAX_REASONS])}{more}", error.missing)

    async def adapter_id(self, name: str, blocks: Span) -> str:
        """The id that an adapter's name has for `blocks` now. Raises NoChain, which lists the adapters that there
        are.
        """
        try:
            return choose_adapter(await self.offers(CACHE_S), name, blocks, self._track_record.standing)
        except NoChain:
            return choose_adapter(await self.offers(FRESH_S), name, blocks, self._track_record.standing)

    async def _plan(self, blocks: Span, needs: ChainNeeds, exclude: Collection[PeerId], max_age_s: float) -> Chain:
        await self.offers(max_age_s)
        return self.plan(blocks, needs, exclude)

    def plan(self, blocks: Span, needs: ChainNeeds, exclude: Collection[PeerId]) -> Chain:
        """A chain by the last lookup, our own measurements and the rules. Raises NoChain."""
        avoid = self.avoided() | frozenset(exclude)
        needs = self.needs(blocks, needs)
        try:
            return plan_chain(self.table, blocks, needs=needs, random=self._random, avoid=avoid)
        except NoChain:
            # The peers that outvoted the others may turn out not to be there.
            if not self._has_reweighed():
                raise
            return plan_chain(self.table, blocks, needs=needs, random=self._random, avoid=avoid)

    def _has_reweighed(self) -> bool:
        """Whether others are usable, now that we know more of those who announce contradicting blocks."""
        table = self._tabled()
        is_other = table.offers != self.table.offers
        self.table = table
        return is_other

    def _tabled(self) -> OfferTable:
        record = self._track_record
        return OfferTable(self._permitted, self._belief, record.standing, record.shown_throughputs())

    def replacement(self, span: Span, needs: ChainNeeds, exclude: Collection[PeerId], between: Between) -> Chain:
        """The best replacement for a part of a chain. Raises NoChain."""
        return self.plan(span, self._between(needs, between), exclude)

    def _between(self, needs: ChainNeeds, between: Between) -> ChainNeeds:
        # Prefer connected peers only for replacements: new chains that did so would all use the peers that we know
        # already.
        return replace(needs, after=between[0], before=between[1], warm=frozenset(self._connected()))

    def needs(self, blocks: Span, needs: ChainNeeds) -> ChainNeeds:
        """`needs` with our own knowledge: delays, the rules and the model's width."""
        first_by, last_by = self._rules.ends(blocks, self._block_count)
        return replace(
            needs,
            rtts_s=self._track_record.rtts_s(),
            position_bytes=self._position_bytes,
            first_by=first_by,
            last_by=last_by,
        )

    def avoided(self) -> frozenset[PeerId]:
        """The peers that failed us lately."""
        return self._track_record.avoided()

    async def offers(self, max_age_s: float) -> list[Offer]:
        """The offers that the rules permit, from a lookup that is at most `max_age_s` old."""
        offers = await self._directory.servers(self._model, self._block_count, max_age_s=max_age_s)
        if offers is not self._seen:
            self._seen, self._permitted = offers, self._rules.permitted(offers)
            self._belief = {o.peer_id: self._belief.get(o.peer_id) or self._doubt() for o in self._permitted}
            self.table = self._tabled()
            self._look_for_the_lost()
        return self._permitted

    def _look_for_the_lost(self) -> None:
        """A peer that could not be reached and has a new announcement may be back: have it asked."""
        if self._track_record.has_doubts:
            for offer in self._permitted:
                self._track_record.announced(offer.peer_id, offer.record.seq)

    def _doubt(self) -> float:
        # All clients see the same queue lengths, some seconds old, and would all go to the shortest queue, which then
        # is no longer the shortest. So each client multiplies a peer's queue by its own random factor: together they
        # share the peers, and most go to the least busy. Each keeps its factors, or second choices would change all the
        # time.
        return self._random.uniform(0.0, 2.0)

    def failed(self, peer: PeerId) -> None:
        """Leave the peer out for a while, longer each time. It may also have new addresses."""
        self._track_record.failed(peer)
        self._directory.doubt(peer)

    def succeeded(self, peer: PeerId) -> None:
        """Forget that the peer failed."""
        self._track_record.succeeded(peer)

    def shown(self, peer: PeerId, throughput: float) -> None:
        """Believe from the next lookup on that the peer is at least that fast."""
        self._track_record.shown(peer, throughput)


def _overlaps(span: Span, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(span.start < end and start < span.end for start, end in ranges)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a session tries to get a chain before its steps fail."""

    # A peer that died may have a replacement that we have not heard of yet, or that is just starting.
    missing_s: float = 5.0
    # If peers are full, other sessions will end.
    busy_s: float = 120.0
    # The same for a session that has computed nothing yet, so that giving up loses nothing; None: `busy_s`.
    first_busy_s: float | None = None


class ChainFinder(Protocol):
    """Finds peers for blocks, and learns from callers how those peers did."""

    async def find(
        self,
        blocks: Span,
        *,
        tokens: int,
        exclude: Collection[PeerId],
        positions: int = 1,
        adapter: AdapterNeed = NO_ADAPTER,
        requests: int = 0,
        between: Between | None = None,
    ) -> Chain:
        """The best chain over `blocks` for steps of `positions` positions, from peers that have the adapter.

        requests: as in ChainNeeds. between: for a replacement, the peers before and after it. Raises NoChain.
        """

    def plan(self, blocks: Span, needs: ChainNeeds, exclude: Collection[PeerId]) -> Chain:
        """A chain by what is known already, without a lookup. Raises NoChain."""

    async def adapter_id(self, name: str, blocks: Span) -> str:
        """The id that an adapter's name has for `blocks`. Raises NoChain, which lists the adapters that there are."""

    async def offers(self, max_age_s: float) -> list[Offer]:
        """What permitted peers announce, from a lookup that is at most `max_age_s` old."""

    def avoided(self) -> frozenset[PeerId]:
        """The peers that are left out now, for a while."""

    def failed(self, peer: PeerId) -> None:
        """Note that the peer broke a promise: leave it out for a while."""

    def succeeded(self, peer: PeerId) -> None:
        """Note that the peer kept its promises."""

    def shown(self, peer: PeerId, throughput: float) -> None:
        """Note that the peer has computed at least so many positions a second through one block."""

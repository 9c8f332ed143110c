"""Finds chains for sessions: joins what the DHT says with how peers have treated us.

Knows the directory, the planner and the links' memory; opens nothing. A peer that fails leaves the
routes of every session of this process in that instant, whatever its announcements say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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
from peerd.routing.failures.track_record import Links

# Clients that wait for a missing server look again this often, not oftener.
FRESH_S = 0.5
# Of peers that cannot be reached, in one message.
MAX_REASONS = 3


class SwarmFinder:
    """Chains over one model's blocks, from the directory's latest view.

    position_bytes: what one position takes on the wire. connected: to whom a connection is open: of replacements that
    are as good as each other one of them is taken, for nobody waits for a dial then.
    """

    def __init__(
        self,
        directory: Directory,
        links: Links,
        model: bytes,
        block_count: int,
        random: Random,
        rules: ChainRules | None = None,
        *,
        position_bytes: int = 0,
        connected: Callable[[], Collection[PeerId]] = tuple,
    ) -> None:
        self._directory = directory
        self._links = links
        self._model = model
        self._block_count = block_count
        self._random = random
        self._rules = rules or ChainRules()
        self._position_bytes = position_bytes
        self._connected = connected
        #: When a chain was wanted last.
        self.used_at = float("-inf")
        #: What the directory said last, as far as it is permitted.
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
        """The best chain over `blocks` for steps of so many positions, or for a pass of so many `requests`.

        between: of a part that replaces another, who stands before and after it. Raises NoChain, naming what nobody
        serves.
        """
        self.used_at = trio.current_time()
        needs = ChainNeeds(tokens=tokens, positions=positions, adapter=adapter, requests=requests)
        if between is not None:
            needs = self._between(needs, between)
            # Somebody waits in mid-answer, and a lookup may have to wait for whoever has just died or hangs.
            with suppress(NoChain):
                return self.plan(blocks, needs, exclude)
        try:
            return await self._plan(blocks, needs, exclude, CACHE_S)
        except NoChain:
            # Whoever is missing may have come since we looked.
            try:
                return await self._plan(blocks, needs, exclude, FRESH_S)
            except NoChain as error:
                raise self._explained(error) from None

    def _explained(self, error: NoChain) -> NoChain:
        """The same, with why those who say that they serve the blocks cannot be reached."""
        reasons = dict.fromkeys(
            why
            for offer in self._permitted
            if any(offer.span.start < end and start < offer.span.end for start, end in error.missing)
            if (why := self._links.why_avoided(offer.peer_id))
        )
        if not reasons:
            return error
        more = f"; and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else ""
        return NoChain(f"{error}: {'; '.join(list(reasons)[:MAX_REASONS])}{more}", error.missing)

    async def adapter_id(self, name: str, blocks: Span) -> str:
        """What an adapter's name means for `blocks` now. Raises NoChain, saying which adapters there are."""
        try:
            return choose_adapter(await self.offers(CACHE_S), name, blocks)
        except NoChain:
            return choose_adapter(await self.offers(FRESH_S), name, blocks)

    async def _plan(self, blocks: Span, needs: ChainNeeds, exclude: Collection[PeerId], max_age_s: float) -> Chain:
        await self.offers(max_age_s)
        return self.plan(blocks, needs, exclude)

    def plan(self, blocks: Span, needs: ChainNeeds, exclude: Collection[PeerId]) -> Chain:
        """A chain by what was looked up last, with what we measured and within the rules. Raises NoChain."""
        avoid = self.avoided() | frozenset(exclude)
        return plan_chain(self.table, blocks, needs=self.needs(blocks, needs), random=self._random, avoid=avoid)

    def replacement(self, span: Span, needs: ChainNeeds, exclude: Collection[PeerId], between: Between) -> Chain:
        """What would take the place of a part of a chain, as `plan` finds it."""
        return self.plan(span, self._between(needs, between), exclude)

    def _between(self, needs: ChainNeeds, between: Between) -> ChainNeeds:
        # A new chain goes wherever it is best, or whoever we know already would have all sessions: this does not.
        return replace(needs, after=between[0], before=between[1], warm=frozenset(self._connected()))

    def needs(self, blocks: Span, needs: ChainNeeds) -> ChainNeeds:
        """The same with what we know ourselves: delays, the rules and the model's width."""
        first_by, last_by = self._rules.ends(blocks, self._block_count)
        return replace(
            needs,
            rtts_s=self._links.rtts_s(),
            position_bytes=self._position_bytes,
            first_by=first_by,
            last_by=last_by,
        )

    def avoided(self) -> frozenset[PeerId]:
        """Who failed us lately."""
        return self._links.avoided()

    async def offers(self, max_age_s: float) -> list[Offer]:
        """What is permitted of all that is offered now, as far as was looked up `max_age_s` ago."""
        offers = await self._directory.servers(self._model, self._block_count, max_age_s=max_age_s)
        if offers is not self._seen:
            self._seen, self._permitted = offers, self._rules.permitted(offers)
            self._belief = {o.peer_id: self._belief.get(o.peer_id) or self._doubt() for o in self._permitted}
            self.table = OfferTable(self._permitted, self._belief)
            self._look_for_the_lost()
        return self._permitted

    def _look_for_the_lost(self) -> None:
        """Whoever could not be reached and is announced anew may be back."""
        if self._links.has_doubts:
            for offer in self._permitted:
                self._links.announced(offer.peer_id, offer.record.seq)

    def _doubt(self) -> float:
        # What a queue was some seconds ago all clients know alike: they would all go to the shortest, which is it no
        # more then. Where each takes it for longer or shorter they share the peers, most of them the least busy; and
        # each stays with its belief, or second choices would change all the time.
        return self._random.uniform(0.0, 2.0)

    def failed(self, peer: PeerId) -> None:
        """Leave the peer out for a while, longer each time; it may have moved meanwhile."""
        self._links.failed(peer)
        self._directory.doubt(peer)

    def succeeded(self, peer: PeerId) -> None:
        """Forget that it failed."""
        self._links.succeeded(peer)


# Between two tries at a chain, at random up to this, so that two clients do not collide for ever.
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a session tries to get a chain before its steps fail."""

    # Who has just died may have a twin that nobody told us of yet, or one that is about to start.
    missing_s: float = 5.0
    # Peers that are full: other sessions end.
    busy_s: float = 120.0


class ChainFinder(Protocol):
    """Finds peers for blocks, and hears how they did."""

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
        """The best chain over `blocks` for steps of so many positions, of peers that have the adapter, by what is
        known now. `requests`: as in ChainNeeds. `between`: of a replacement, who stands before and after it.
        Raises NoChain."""

    async def adapter_id(self, name: str, blocks: Span) -> str:
        """What an adapter's name means for `blocks`. Raises NoChain, saying which adapters there are."""

    def avoided(self) -> frozenset[PeerId]:
        """Who is left out now, for a while."""

    def failed(self, peer: PeerId) -> None:
        """The peer broke a promise: leave it out for a while."""

    def succeeded(self, peer: PeerId) -> None:
        """The peer keeps its promises."""

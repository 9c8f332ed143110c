"""Keeps a client's view of one model's peers fresh: how far they are, and who takes over when a hop dies.

Knows sessions and their chains, and when to look again; whom to ask is `routing.probes`' choice, and the asking the
prober's. The difficulty is to be ready and cheap at once: a first plan must not wait for the slow, a chain's
second choices must be connected before they are needed, and a model that nobody uses must ask nobody.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import Protocol

import trio

from peerd.client.finding.finder import SwarmFinder
from peerd.client.finding.served_by import ServedBy
from peerd.discovery.prober import Prober
from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import AdapterNeed
from peerd.routing.chains.chain import ChainNeeds
from peerd.routing.chains.offer_table import OfferTable
from peerd.routing.chains.probes import worth_probing
from peerd.routing.directory.offer import Offer

# Of a chain of 8 hops, three choices each.
FIRST_PROBES = 24
# Later rounds ask those again that count, and a few others.
MORE_PROBES = 12
# Delays change with the routes of the internet, and servers come and go: between rounds while the model is in use.
ROUND_S = 30.0
# A model that was used so long ago is not in use any more.
IDLE_S = 120.0
# How soon a new chain, or one that was mended, has its second choices.
LOOK_S = 1.0
# How old the view of the swarm may be by which second choices are made.
MAX_AGE_S = 15.0
# Connections to second choices that are kept open, of all sessions together.
MAX_STANDBYS = 16
# So many chains are planned to guess who will be in the first.
PLANS = 4
# Whoever opens a model waits so long for the first round, and plans with what is known by then.
FIRST_WAIT_S = 1.0


class Watched(Protocol):
    """A session whose chain is to have second choices."""

    @property
    def closed(self) -> bool:
        """Whether it has ended."""

    @property
    def chain(self) -> tuple[ServedBy, ...]:
        """Who serves which blocks now."""


class Scout:
    """Scouts for the sessions of one model. `run` owns the work; `ready` is set once the first round has ended."""

    def __init__(
        self,
        finder: SwarmFinder,
        prober: Prober,
        blocks: Span,
        random: Random,
    ) -> None:
        self.ready = trio.Event()
        #: Who would take over from a hop of some session's chain; a connection to each is open, or being opened.
        self.standbys: frozenset[PeerId] = frozenset()
        self._finder = finder
        self._prober = prober
        self._blocks = blocks
        self._random = random
        # To whom a connection stays open that nothing else may use yet.
        self._kept: frozenset[PeerId] = frozenset()
        self._sessions: dict[Watched, ChainNeeds] = {}
        # Of the view of the swarm that we looked at last.
        self._seen: OfferTable | None = None
        self._known: frozenset[PeerId] = frozenset()

    def __repr__(self) -> str:
        return f"<Scout of {self._blocks} sessions={len(self._sessions)} standbys={len(self.standbys)}>"

    def watch(self, session: Watched, *, tokens: int, adapter: AdapterNeed) -> None:
        """Have second choices ready for the session's chain until it is closed."""
        self._sessions[session] = ChainNeeds(tokens=tokens, adapter=adapter)

    async def run(self) -> None:
        """Measure now, and again while the model is in use, until cancelled. Keeps second choices connected."""
        measure_at = look_at = trio.current_time()
        chains: tuple[tuple[ServedBy, ...], ...] = ()
        while True:
            self._sessions = {session: needs for session, needs in self._sessions.items() if not session.closed}
            now = trio.current_time()
            if not self.ready.is_set() or self._is_used():
                newcomers = self._newcomers()
                if min(measure_at, look_at) <= now or self._chains() != chains:
                    chains, look_at = self._chains(), now + MAX_AGE_S
                    await self._look(measure=measure_at <= now)
                if newcomers and self.ready.is_set():
                    # Whoever was never measured counts as far away, and would not be used before the next round.
                    await self._prober.probe(newcomers)
                if measure_at <= now:
                    measure_at = now + ROUND_S * self._random.uniform(0.8, 1.2)
                    self.ready.set()
            elif measure_at <= now and (self._kept or self._prober.has_opened):
                self.standbys, self._kept, chains = frozenset(), frozenset(), ()
                self._prober.close_unused()
            await trio.sleep(LOOK_S)

    async def _look(self, *, measure: bool) -> None:
        """See who is there, and connect to the second choices; with `measure`, to others too."""
        await self._finder.offers(MAX_AGE_S)
        asked = await self._second_choices()
        if measure:
            asked += self._probes(MORE_PROBES if self.ready.is_set() else FIRST_PROBES)
        await self._prober.probe({offer.peer_id: offer for offer in asked}.values())
        if measure:
            # A first session need not dial again those whom we have just talked to.
            self._kept = frozenset() if self.ready.is_set() else self._likely()
        self._kept |= self.standbys
        self._prober.close_unused(self._kept)

    def _likely(self) -> frozenset[PeerId]:
        """Who would be in a chain that was wanted now. Near ties are many: some of them."""
        found: set[PeerId] = set()
        with suppress(NoChain):
            for _ in range(PLANS):
                found.update(hop.peer_id for hop in self._finder.plan(self._blocks, ChainNeeds(), ()).hops)
        return frozenset(sorted(found)[:MAX_STANDBYS])

    def _newcomers(self) -> list[Offer]:
        """Who has come since the last look, by one of their offers; a few of them where they are many."""
        table = self._finder.table
        if table is self._seen:
            return []
        offers = {offer.peer_id: offer for offer in table.offers}
        fresh = sorted(offers.keys() - self._known)
        self._seen, self._known = table, frozenset(offers)
        return [offers[peer] for peer in self._random.sample(fresh, min(len(fresh), MORE_PROBES))]

    def _is_used(self) -> bool:
        return bool(self._sessions) or trio.current_time() - self._finder.used_at < IDLE_S

    def _chains(self) -> tuple[tuple[ServedBy, ...], ...]:
        return tuple(session.chain for session in self._sessions)

    def _probes(self, count: int) -> list[Offer]:
        needs = self._finder.needs(self._blocks, ChainNeeds())
        return worth_probing(self._finder.table, self._blocks, needs, count, self._random, self._finder.avoided())

    async def _second_choices(self) -> list[Offer]:
        found: dict[PeerId, Offer] = {}
        for session, needs in list(self._sessions.items()):
            # Many chains of many hops: others get a turn between them.
            await trio.lowlevel.checkpoint()
            hops = session.chain
            peers = [None, *(hop.peer for hop in hops), None]
            for index, hop in enumerate(hops):
                try:
                    chain = self._finder.replacement(hop.span, needs, (hop.peer,), (peers[index], peers[index + 2]))
                except NoChain:
                    continue
                found.update((second.peer_id, second.offer) for second in chain.hops)
        chosen = dict(list(found.items())[:MAX_STANDBYS])
        self.standbys = frozenset(chosen)
        return list(chosen.values())

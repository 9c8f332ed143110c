"""Keeps a client ready: measures how far the peers of one model are, and connects to those that could replace a hop.

It decides when to look; `routing/chains/probes.py` chooses the peers to measure, and the prober measures them. Being
ready must cost little. A first plan must not wait for slow peers; a chain's second choices must be connected before
they are needed; and for a model that is not in use no peer must be asked.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import Protocol

import trio

from peerd.client.finding.finder import SwarmFinder
from peerd.client.finding.served_by import ServedBy
from peerd.discovery.prober import RttProber
from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import AdapterNeed
from peerd.routing.chains.chain import ChainNeeds
from peerd.routing.chains.offer_table import OfferTable
from peerd.routing.chains.probes import worth_probing
from peerd.routing.directory.offer import Offer

# For a chain of 8 hops: three choices each.
FIRST_PROBES = 24
# Later rounds ask the peers that matter again, and a few others.
MORE_PROBES = 12
# The time between rounds while the model is in use. Delays change with the routes of the internet, and servers come and
# go.
ROUND_S = 30.0
# A model that was not used for this long counts as not in use.
IDLE_S = 120.0
# How soon a new or repaired chain has its second choices.
LOOK_S = 1.0
# How old the lookup may be from which second choices are made.
MAX_AGE_S = 15.0
# How many connections to second choices are kept open, for all sessions together.
MAX_STANDBYS = 16
# How many chains are planned to guess which peers will be in the first one.
PLANS = 4
# Opening a model waits this long for the first round, and then plans with what is known.
FIRST_WAIT_S = 1.0


class WatchedSession(Protocol):
    """A session whose chain is to have second choices."""

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""

    @property
    def chain(self) -> tuple[ServedBy, ...]:
        """Which peers serve which blocks now."""


class Scout:
    """Scouts for the sessions of one model. `run` does the work; `ready` is set once the first round has ended."""

    def __init__(
        self,
        finder: SwarmFinder,
        prober: RttProber,
        blocks: Span,
        random: Random,
    ) -> None:
        self.ready = trio.Event()
        #: The peers that would replace a hop of some session's chain. Each is connected, or being connected.
        self.standbys: frozenset[PeerId] = frozenset()
        self._finder = finder
        self._prober = prober
        self._blocks = blocks
        self._random = random
        # The peers whose connection is kept open although nothing else may use it yet.
        self._kept: frozenset[PeerId] = frozenset()
        self._sessions: dict[WatchedSession, ChainNeeds] = {}
        # The offers seen at the last look, to notice new peers.
        self._seen: OfferTable | None = None
        self._known: frozenset[PeerId] = frozenset()

    def __repr__(self) -> str:
        return f"<Scout of {self._blocks} sessions={len(self._sessions)} standbys={len(self.standbys)}>"

    def watch(self, session: WatchedSession, *, tokens: int, adapter: AdapterNeed) -> None:
        """Keep second choices ready for the session's chain until it is closed."""
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
                    # A peer that was never measured counts as far away, and would not be used before the next round.
                    await self._prober.probe(newcomers)
                if measure_at <= now:
                    measure_at = now + ROUND_S * self._random.uniform(0.8, 1.2)
                    self.ready.set()
            elif measure_at <= now and (self._kept or self._prober.has_opened):
                self.standbys, self._kept, chains = frozenset(), frozenset(), ()
                self._prober.close_unused()
            await trio.sleep(LOOK_S)

    async def _look(self, *, measure: bool) -> None:
        """Look up the offers, and connect to the second choices; with `measure`, also measure other peers."""
        await self._finder.offers(MAX_AGE_S)
        asked = await self._second_choices()
        if measure:
            asked += self._probes(MORE_PROBES if self.ready.is_set() else FIRST_PROBES)
        await self._prober.probe({offer.peer_id: offer for offer in asked}.values())
        if measure:
            # The first session then need not dial the peers again that we have just measured.
            self._kept = frozenset() if self.ready.is_set() else self._likely()
        self._kept |= self.standbys
        self._prober.close_unused(self._kept)

    def _likely(self) -> frozenset[PeerId]:
        """The peers that a chain planned now could have. Since many are nearly equal, several chains are planned."""
        found: set[PeerId] = set()
        with suppress(NoChain):
            for _ in range(PLANS):
                found.update(hop.peer_id for hop in self._finder.plan(self._blocks, ChainNeeds(), ()).hops)
        return frozenset(sorted(found)[:MAX_STANDBYS])

    def _newcomers(self) -> list[Offer]:
        """One offer of each peer that has come since the last look; a random few if there are many."""
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
            # Planning for many sessions takes long, so other tasks get a turn in between.
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

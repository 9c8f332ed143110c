"""Measures how far a server is from the peers to which it may push, and puts the delays into its announcements.

A chain's delays lie between its servers, where no client can measure them. Many peers may be the next hop, few of them
matter, and not every server can ask all others. So the best known peers are asked again now and then, and strangers a
few at a time. A new measurement goes out with the next regular announcement and never causes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

import trio

from peerd.discovery.prober import RttProber
from peerd.protocol.identity import PeerId
from peerd.protocol.records.bodies import MAX_RTTS
from peerd.protocol.records.envelope import ServerRecord
from peerd.routing.chains.probes import next_hops, with_rtts
from peerd.routing.chains.rules import ChainRules
from peerd.routing.directory.directory import Directory
from peerd.routing.directory.offer import Offer
from peerd.routing.failures.track_record import TrackRecord

# The time between rounds. It varies by a fifth, so that servers that started together drift apart.
ROUND_S = 60.0
# A new server first announces itself and finds the other announcements.
FIRST_ROUND_S = 5.0
# How many peers are asked in a round: of those from which a chain would gain most, measured or not, and of all others.
BEST_PROBES = 8
STRANGER_PROBES = 4
# A measured peer is asked again every this many rounds on average, or in each round if it is connected anyway.
AGAIN_ROUNDS = 5
# How old a view of the swarm may be.
MAX_AGE_S = 30.0


class Neighbours:
    """The delays from us, `own`, to the peers that may be the next hop after our spans. `run` measures them."""

    def __init__(
        self,
        own: PeerId,
        directory: Directory,
        track_record: TrackRecord,
        prober: RttProber,
        random: Random,
        rules: ChainRules,
        spans: Callable[[], Iterable[ServerRecord]],
    ) -> None:
        self._own = own
        self._directory = directory
        self._track_record = track_record
        self._prober = prober
        self._random = random
        self._rules = rules
        self._spans = spans
        self._block_counts: dict[bytes, int] = {}
        self._offers: dict[bytes, list[Offer]] = {}

    def __repr__(self) -> str:
        return f"<Neighbours of {self._own} models={len(self._block_counts)}>"

    def serves(self, model: bytes, block_count: int) -> None:
        """Note that we serve blocks of this model from now on."""
        self._block_counts[model] = block_count

    def filled(self, records: Sequence[ServerRecord]) -> list[ServerRecord]:
        """The records with the measured delays."""
        rtts_s = self._track_record.rtts_s()
        return [with_rtts(each, self._offers.get(each.model, ()), self._own, rtts_s, MAX_RTTS) for each in records]

    async def run(self) -> None:
        """Measure until cancelled."""
        await trio.sleep(FIRST_ROUND_S * self._random.uniform(0.2, 1.0))
        while True:
            await self._measure()
            await trio.sleep(ROUND_S * self._random.uniform(0.8, 1.2))

    async def _measure(self) -> None:
        for model, block_count in list(self._block_counts.items()):
            offers = await self._directory.servers(model, block_count, max_age_s=MAX_AGE_S)
            self._offers[model] = self._rules.permitted(offers)
        chosen: dict[PeerId, Offer] = {}
        for record in self._spans():
            found = next_hops(self._offers.get(record.model, ()), self._own, record.span, self._track_record.rtts_s())
            others = found[BEST_PROBES:]
            strangers = self._random.sample(others, min(len(others), STRANGER_PROBES))
            chosen.update((offer.peer_id, offer) for offer in (*found[:BEST_PROBES], *strangers))
        avoided = self._track_record.avoided()
        due = [offer for peer, offer in chosen.items() if peer not in avoided and self._is_due(peer)]
        await self._prober.probe(due)
        self._prober.close_unused()

    def _is_due(self, peer: PeerId) -> bool:
        """Whether to measure the peer in this round."""
        if self._track_record.rtt_s(peer) is None or self._prober.is_connected(peer):
            return True
        return self._random.random() < 1 / AGAIN_ROUNDS

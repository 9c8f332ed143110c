"""Chooses servers for an audit: the ones to check, and others that share neither a key nor a network with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from peerd.client.finding.served_by import ServedBy
from peerd.compute.audits.thresholds import Numerics, Pair
from peerd.protocol.addresses import public_network
from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import AdapterNeed
from peerd.routing.chains.chain import Chain, ChainNeeds, Hop
from peerd.routing.directory.directory import CACHE_S
from peerd.routing.directory.offer import Offer
from peerd.routing.directory.standing import StandingOf


class Planner(Protocol):
    """Knows who serves what, and plans chains: the swarm's finder."""

    async def offers(self, max_age_s: float) -> list[Offer]:
        """The offers that may be used, from a lookup that is at most `max_age_s` old."""

    def plan(self, blocks: Span, needs: ChainNeeds, exclude: Collection[PeerId]) -> Chain:
        """A chain by the last lookup. Raises NoChain."""


class Others:
    """The servers of one model as an audit sees them, once `look` has been called."""

    def __init__(self, planner: Planner, standing: StandingOf) -> None:
        self._planner = planner
        self._standing = standing
        self._offers: dict[PeerId, list[Offer]] = {}

    def __repr__(self) -> str:
        return f"<Others of {len(self._offers)} peers>"

    async def look(self) -> None:
        """Look up who serves what now."""
        offers = await self._planner.offers(CACHE_S)
        self._offers = {}
        for offer in offers:
            self._offers.setdefault(offer.peer_id, []).append(offer)

    def voices(self, peer: PeerId) -> frozenset[str]:
        """Who counts as one with a peer: the networks in which we reached it or which it announces, or itself alone."""
        announced = {
            network
            for offer in self._offers.get(peer, ())
            for address in offer.addresses
            if (network := public_network(address.ip))
        }
        networks = announced | ({self._standing(peer).voice} - {str(peer)})
        return frozenset(networks or {str(peer)})

    def voice(self, peer: PeerId) -> str:
        """One of a peer's voices, always the same."""
        return min(self.voices(peer))

    def hops(self, chain: Iterable[ServedBy]) -> tuple[Hop, ...] | None:
        """The servers of an answer as hops to open again; None if one of them is gone."""
        found = []
        for index, served in enumerate(chain):
            offer = next((o for o in self._offers.get(served.peer, ()) if _holds(o.span, served.span)), None)
            if offer is None:
                return None
            found.append(Hop(index, served.peer, served.span, offer))
        return tuple(found)

    def chain(
        self,
        blocks: Span,
        length: int,
        adapter: AdapterNeed,
        *,
        without: Iterable[PeerId],
        busy: Collection[PeerId],
        like: Sequence[Hop],
    ) -> tuple[Hop, ...] | None:
        """A chain for sessions of `length` positions over servers that have nothing in common with those of `without`.

        busy: peers that the user's sessions need. like: hops whose results it will be compared with: servers that round
        as they do show smaller lies. None if there is no such chain.
        """
        taken = frozenset[str]().union(*map(self.voices, without))
        excluded = {peer for peer in self._offers if taken & self.voices(peer)} | set(busy)
        theirs = {hop.offer.record.quantization for hop in like} | {"none"}
        coarser = {
            peer
            for peer, offers in self._offers.items()
            if any(offer.record.quantization not in theirs for offer in offers)
        }
        needs = ChainNeeds(tokens=length, positions=length, adapter=adapter)
        for left_out in (excluded | coarser, excluded):
            try:
                return self._planner.plan(blocks, needs, left_out).hops
            except NoChain:
                continue
        return None


def part_of(hops: Iterable[Hop], blocks: Span) -> tuple[Hop, ...]:
    """The hops of a chain that run these blocks, cut to them."""
    cut: list[Hop] = []
    for hop in hops:
        start, end = max(hop.span.start, blocks.start), min(hop.span.end, blocks.end)
        if start < end:
            cut.append(replace(hop, index=len(cut), span=Span(start, end)))
    return tuple(cut)


def pairs_of(some: Sequence[Hop], others: Sequence[Hop]) -> set[Pair]:
    """Which numerics meet where two chains over the same blocks compute the same block."""
    return {
        (_numerics(one), _numerics(other))
        for one in some
        for other in others
        if max(one.span.start, other.span.start) < min(one.span.end, other.span.end)
    }


def _numerics(hop: Hop) -> Numerics:
    record = hop.offer.record
    return Numerics(record.dtype, record.quantization)


def _holds(span: Span, part: Span) -> bool:
    return span.start <= part.start and part.end <= span.end


InUse = Callable[[], frozenset[PeerId]]
"""The peers that the user's own sessions use now."""

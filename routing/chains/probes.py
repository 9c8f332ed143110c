"""Whom to measure: the peers that a plan would plausibly use if it knew how near they are.

Knows offers and delays; measures nothing. The difficulty is that a thousand peers are too many to ask, and
that who is never asked is never used. So it asks those that chains would have if strangers were near, in every
part of the blocks, and a few at random.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from random import Random

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ServerRecord
from peerd.protocol.span import Span
from peerd.routing.chains.chain import HOP_S, ChainNeeds, plan_chain
from peerd.routing.chains.offer_table import OfferTable
from peerd.routing.directory.offer import Offer

# What somebody whom we never measured may turn out to be: a peer of our own region. Petals' default for such is 0.
HOPEFUL_RTT_S = 0.02
# Of those to ask, how many are taken at random among the ones that we know nothing of.
STRANGERS = 1 / 4


def worth_probing(
    table: OfferTable, blocks: Span, needs: ChainNeeds, count: int, random: Random, avoid: Collection[PeerId] = ()
) -> list[Offer]:
    """At most `count` peers, the likeliest first, by one of their offers each."""
    needs = replace(needs, unknown_rtt_s=HOPEFUL_RTT_S)
    found: dict[PeerId, Offer] = {}
    strangers = int(count * STRANGERS)
    # Whom no chain can do without: whoever else has a block was left out to see who comes next.
    needed: set[PeerId] = set()
    while len(found) < count - strangers:
        try:
            chain = plan_chain(table, blocks, needs=needs, random=random, avoid={*avoid, *(found.keys() - needed)})
        except NoChain as error:
            holders = {peer for peer, offer in found.items() if _holds_some(offer.span, error.missing)} - needed
            if not holders:
                break
            needed |= holders
            continue
        fresh = [hop for hop in chain.hops if hop.peer_id not in found]
        if not fresh:
            break
        found.update((hop.peer_id, hop.offer) for hop in fresh)
    likely = dict(list(found.items())[: count - strangers])
    others = {offer.peer_id: offer for offer in table.offers if _is_stranger(offer, blocks, needs.rtts_s)}
    for peer in {*likely, *avoid} & others.keys():
        del others[peer]
    chosen = random.sample(sorted(others), min(len(others), count - len(likely)))
    return [*likely.values(), *(others[peer] for peer in chosen)]


def next_hops(offers: Sequence[Offer], own: PeerId, span: Span, rtts_s: Mapping[PeerId, float]) -> list[Offer]:
    """Who may run what follows on `span`: those that a chain gains most by first.

    One offer a peer. Those who were never measured are taken to be near.
    """
    best: dict[PeerId, tuple[float, Offer]] = {}
    for offer in offers:
        if offer.peer_id == own or offer.record.state != "online":
            continue
        # Entered where our span ends, unless it ends by then itself: then as soon as we have run one block.
        first = span.end if offer.span.end > span.end else max(offer.span.start, span.start + 1)
        count = offer.span.end - first
        if offer.span.start > span.end or count < 1:
            continue
        way_s = rtts_s.get(offer.peer_id, HOPEFUL_RTT_S) / 2 + HOP_S + offer.record.queue_s
        block_s = way_s / count + offer.block_s
        # Blocks that we have as well are seldom worth a hop.
        cost_s = block_s if offer.span.end > span.end else 2 * block_s
        if offer.peer_id not in best or cost_s < best[offer.peer_id][0]:
            best[offer.peer_id] = (cost_s, offer)
    return [offer for _, offer in sorted(best.values(), key=lambda scored: (scored[0], scored[1].peer_id))]


def with_rtts(
    record: ServerRecord, offers: Sequence[Offer], own: PeerId, rtts_s: Mapping[PeerId, float], most: int
) -> ServerRecord:
    """The record with the measured delays to those that may follow on its span, most useful first."""
    useful = [offer.peer_id for offer in next_hops(offers, own, record.span, rtts_s) if offer.peer_id in rtts_s]
    # A tenth of a millisecond is less than what one measurement differs from the next.
    return replace(record, rtts=tuple((peer, round(rtts_s[peer], 4)) for peer in useful[:most]))


def _holds_some(span: Span, runs: Sequence[tuple[int, int]]) -> bool:
    return any(span.start < end and start < span.end for start, end in runs)


def _is_stranger(offer: Offer, blocks: Span, rtts_s: Mapping[PeerId, float]) -> bool:
    return offer.peer_id not in rtts_s and offer.span.start < blocks.end and blocks.start < offer.span.end

"""Chooses the peers whose round-trip time is worth measuring: those that a plan would use if they were near.

A thousand peers are too many to ask, and a peer that is never asked is never used. So this picks the peers of the
chains that would be best if unmeasured peers were near, in every part of the blocks, and a few at random.
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

# The round-trip time that an unmeasured peer may turn out to have: a peer of our own region. Petals uses 0.
HOPEFUL_RTT_S = 0.02
# The share of the chosen peers that is taken at random among unmeasured ones.
STRANGERS = 1 / 4


def worth_probing(
    table: OfferTable, blocks: Span, needs: ChainNeeds, count: int, random: Random, avoid: Collection[PeerId] = ()
) -> list[Offer]:
    """At most `count` peers, the likeliest first, with one offer of each."""
    needs = replace(needs, unknown_rtt_s=HOPEFUL_RTT_S)
    found: dict[PeerId, Offer] = {}
    strangers = int(count * STRANGERS)
    # Peers needed by every chain, found when excluding all chosen peers left some blocks without a server.
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
    """The peers that may run the blocks behind `span`, those that a chain gains most by first. One offer for each peer.

    Peers that were never measured count as near.
    """
    best: dict[PeerId, tuple[float, Offer]] = {}
    for offer in offers:
        if offer.peer_id == own or offer.record.state != "online":
            continue
        # Entered where our span ends; a span that ends no later than ours is entered as soon as we have run one block.
        first = span.end if offer.span.end > span.end else max(offer.span.start, span.start + 1)
        count = offer.span.end - first
        if offer.span.start > span.end or count < 1:
            continue
        way_s = rtts_s.get(offer.peer_id, HOPEFUL_RTT_S) / 2 + HOP_S + offer.record.queue_s
        block_s = way_s / count + offer.block_s
        # Blocks that we host as well are seldom worth a hop.
        cost_s = block_s if offer.span.end > span.end else 2 * block_s
        if offer.peer_id not in best or cost_s < best[offer.peer_id][0]:
            best[offer.peer_id] = (cost_s, offer)
    return [offer for _, offer in sorted(best.values(), key=lambda scored: (scored[0], scored[1].peer_id))]


def with_rtts(
    record: ServerRecord, offers: Sequence[Offer], own: PeerId, rtts_s: Mapping[PeerId, float], most: int
) -> ServerRecord:
    """`record` with the measured round-trip times to peers that may follow on its span, most useful first, at most
    `most`.
    """
    useful = [offer.peer_id for offer in next_hops(offers, own, record.span, rtts_s) if offer.peer_id in rtts_s]
    # One measurement differs from the next by more than a tenth of a millisecond.
    return replace(record, rtts=tuple((peer, round(rtts_s[peer], 4)) for peer in useful[:most]))


def _holds_some(span: Span, runs: Sequence[tuple[int, int]]) -> bool:
    return any(span.start < end and start < span.end for start, end in runs)


def _is_stranger(offer: Offer, blocks: Span, rtts_s: Mapping[PeerId, float]) -> bool:
    return offer.peer_id not in rtts_s and offer.span.start < blocks.end and blocks.start < offer.span.end

"""Plans a chain of peers over the blocks that a client needs. A chain may enter and leave spans at any block.

`costs` says what each offer costs; `for_steps` and `for_passes` search the cheapest chain. Delays and costs are
arguments; nothing here measures or sends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from random import Random

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.costs import HOP_S, NO_ROOM_S, UNKNOWN_RTT_S, ChainNeeds, select_columns
from peerd.routing.chains.for_passes import fastest_for_passes
from peerd.routing.chains.for_steps import fastest_for_steps
from peerd.routing.chains.offer_table import OfferTable
from peerd.routing.directory.offer import Offer

__all__ = [
    "HOP_S",
    "NEAR_BEST",
    "NO_ROOM_S",
    "UNKNOWN_RTT_S",
    "Between",
    "Chain",
    "ChainNeeds",
    "Hop",
    "NoChain",
    "OfferTable",
    "plan_chain",
]

# Chains that cost up to this factor more than the best are as good: a random choice among them spreads clients.
NEAR_BEST = 1.05


Between = tuple[PeerId | None, PeerId | None]
"""The peers before and after a part of a chain; None is the client."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One place in a chain: a peer, the part of its span that is used, and its index among the hops."""

    index: int
    peer_id: PeerId
    span: Span
    offer: Offer


@dataclass(frozen=True, slots=True)
class Chain:
    """Hops whose spans join up.

    cost_s: the seconds that one step or request is expected to take, there and back.
    slowest_s: in a chain for training passes, the seconds that its slowest hop takes for each request; else 0.
    """

    hops: tuple[Hop, ...]
    cost_s: float
    slowest_s: float = 0.0


def plan_chain(
    offers: Iterable[Offer] | OfferTable,
    span: Span,
    *,
    needs: ChainNeeds,
    random: Random,
    avoid: Collection[PeerId] = (),
) -> Chain:
    """A chain over the blocks of `span` that costs at most 5 % more than the best, chosen at random among such chains.

    A caller that plans often with the same offers should make an OfferTable of them. Raises NoChain whose `missing`
    has the runs of blocks, as (start, end), that no usable offer holds.
    """
    table = offers if isinstance(offers, OfferTable) else OfferTable(offers)
    columns = select_columns(table, span, needs, avoid)
    slowest_s = 0.0
    if needs.requests:
        runs, cost_s, slowest_s = fastest_for_passes(columns, len(span), needs.requests, NEAR_BEST, random)
    else:
        runs, cost_s = fastest_for_steps(columns, len(span), NEAR_BEST, random)
    hops = []
    for index, (at, start, end) in enumerate(runs):
        offer = columns.offers[at]
        hops.append(Hop(index, offer.peer_id, Span(span.start + start, span.start + end), offer))
    return Chain(tuple(hops), cost_s, slowest_s)

"""Which span a server should host: the one that lifts the weakest blocks most, now and while the swarm changes.

Knows offers and block counts; knows neither memory nor disks: how many blocks fit is given. The difficulty is thrash:
every server sees the same swarm a little late, and all could fill the same gap. So a move must pay by a measure that
all share and that each move raises; who moves says so before it does, and looks again before it acts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from peerd.protocol.announcements import intention_slot
from peerd.protocol.span import Span
from peerd.routing.flow import flows_with
from peerd.routing.offer import Offer

Floats = NDArray[np.float64]

# A move must gain this part of what a server of its speed adds to a swarm that is perfectly even: loading takes
# minutes, and sessions have to find other peers.
LEAST_GAIN = 0.25
# What is on disk already is as good as a place that gains so much less, for a download takes longer than all the rest.
ON_DISK_GAIN = 0.1
# A block without a server counts as if one had a millionth of the slowest server's speed: closing a gap beats all.
_GAP = 1e-6


def block_rates(offers: Iterable[Offer], block_count: int) -> Floats:
    """For each block, the positions a second that its servers do together.

    Each position passes all blocks of a server's span, so a server gives each the n-th part of its
    throughput. Who is joining counts, or several newcomers would all fill the same gap.
    """
    rates = np.zeros(block_count)
    for offer in offers:
        if offer.record.state in ("joining", "online"):
            rates[offer.span.start : offer.span.end] += 1 / (offer.block_s * len(offer.span))
    return rates


def choose_span(offers: Iterable[Offer], block_count: int, size: int, on_disk: frozenset[int] = frozenset()) -> Span:
    """The span of `size` blocks (all, if there are fewer) to serve next to `offers`, which are without our own.

    Of all such spans, the one whose weakest block is the weakest; where that is equal, the next weakest decides, then
    how many of its blocks are `on_disk` already, and at last the lower start. Raises ValueError unless `size` is
    positive.
    """
    if size < 1:
        raise ValueError(f"a span has at least one block, not {size}")
    size = min(size, block_count)
    rates = block_rates(_as_announced(offers), block_count)

    def rank(start: int) -> tuple[list[float], int]:
        return sorted(rates[start : start + size]), -len(on_disk.intersection(range(start, start + size)))

    start = min(range(block_count - size + 1), key=rank)
    return Span(start, start + size)


def choose_move(
    offers: Sequence[Offer], own: Offer, block_count: int, *, on_disk: frozenset[int] = frozenset()
) -> Span | None:
    """Where the server of `own` should go instead, with as many blocks; None where it should stay.

    `offers` is the whole swarm, `own` left out or not. A move never leaves a block without a server, and gains at
    least a quarter of what such a server adds to a swarm that is perfectly even.
    """
    others = _as_announced([offer for offer in offers if not _same(offer, own)])
    span = own.span
    if not _stay_covered(others, span):
        return None
    ideal = 1 / own.block_s / block_count
    gains = _values_by_start(others, own, block_count) / ideal
    gains += _gaps_by_start(others, len(span), block_count) / len(span)
    gains -= gains[span.start]
    gains[_already_there(on_disk, len(span), len(gains))] += ON_DISK_GAIN
    best = int(gains.argmax())
    return None if gains[best] < LEAST_GAIN else Span(best, best + len(span))


def _gaps_by_start(others: Iterable[Offer], size: int, block_count: int) -> Floats:
    """For each start of a span, how many of its blocks nobody else has.

    With two gaps no single move makes the swarm whole, so nothing that it carries would be gained by the first: yet
    somebody has to begin. As no move uncovers a block, this only ever falls for all.
    """
    gaps = np.concatenate(([0.0], np.cumsum(block_rates(others, block_count) == 0)))
    result: Floats = gaps[size:] - gaps[:-size]
    return result


def _as_announced(offers: Iterable[Offer]) -> list[Offer]:
    """The swarm once everybody is where it said it is about to go.

    Had two servers of the same blocks both said so, and then counted on each other to stay, both would go. As it is
    both stay, and try again at times of their own.
    """
    offers = list(offers)
    goals = {(offer.peer_id, offer.record.slot) for offer in offers if offer.record.state == "joining"}
    return [offer for offer in offers if (offer.peer_id, intention_slot(offer.record.slot)) not in goals]


def _same(offer: Offer, own: Offer) -> bool:
    return offer.peer_id == own.peer_id and offer.record.slot == own.record.slot


def _stay_covered(others: Iterable[Offer], span: Span) -> bool:
    """Whether somebody who is online holds each block of the span."""
    held = np.zeros(span.end, dtype=bool)
    for offer in others:
        if offer.record.state == "online":
            held[offer.span.start : offer.span.end] = True
    return bool(held[span.start :].all())


def _values_by_start(others: Sequence[Offer], own: Offer, block_count: int) -> Floats:
    """For each start of our span, what the swarm is worth with us there, in positions a second.

    What it carries is what counts, but one move seldom changes that: several blocks may be the weakest. So evenness
    counts too, which every move to weaker blocks raises.
    """
    size, throughput = len(own.span), 1 / own.block_s
    servers = [(offer.span, 1 / offer.block_s) for offer in others if offer.record.state in ("joining", "online")]
    rates = block_rates(others, block_count)
    return flows_with(servers, size, throughput, block_count) + _evenness(rates, throughput / size, size)


def _evenness(rates: Floats, share: float, size: int) -> Floats:
    """For each start of a span, the harmonic mean of the blocks' rates once a server adds `share` to each of them.

    A position's time is the sum of what it takes at each block, so this is the speed of a swarm whose servers share
    their time evenly; of all swarms of the same servers, the even one has the greatest.
    """
    least = _GAP * share
    plain = 1 / np.maximum(rates, least)
    lifted = 1 / (np.maximum(rates, least) + share)
    change = np.concatenate(([0.0], np.cumsum(lifted - plain)))
    totals = plain.sum() + change[size:] - change[:-size]
    result: Floats = len(rates) / totals
    return result


def _already_there(on_disk: frozenset[int], size: int, starts: int) -> NDArray[np.bool_]:
    stored = np.zeros(starts + size)
    stored[[block + 1 for block in on_disk if block + 1 < len(stored)]] = 1
    counts = stored.cumsum()
    complete: NDArray[np.bool_] = counts[size:] - counts[:-size] == size
    return complete

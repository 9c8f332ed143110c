"""Which span a new server should host: the one that lifts the weakest blocks most (Petals' rule).

Knows offers and block counts; knows neither memory nor disks: how many blocks fit is given.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from peerd.protocol.span import Span
from peerd.routing.offer import Offer


def block_rates(offers: Iterable[Offer], block_count: int) -> NDArray[np.float64]:
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
    rates = block_rates(offers, block_count)

    def rank(start: int) -> tuple[list[float], int]:
        return sorted(rates[start : start + size]), -len(on_disk.intersection(range(start, start + size)))

    start = min(range(block_count - size + 1), key=rank)
    return Span(start, start + size)

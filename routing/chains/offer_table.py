"""A model's offers as columns of numbers, which all plans share while the swarm stays the same.

Reading a thousand records takes longer than planning with them, and a client plans again whenever a peer fails. So
the records are read once for each view of the swarm, and a plan only says which columns it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from peerd.protocol.identity import PeerId
from peerd.routing.chains.claims import believed
from peerd.routing.directory.offer import Offer, agreeing
from peerd.routing.directory.standing import StandingOf, unknown

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]


class OfferTable:
    """One column for each offer that is online and whose block digests are those of the peers that weigh most.

    starts, ends: the span.
    block_s: seconds that a position takes through one block.
    queue_s, free_tokens, uplink: as announced.
    near, far: pairs of columns whose delay one of their peers measured, each pair in both directions.
    apart_s: that delay, one way; NaN between two spans of one peer. Pairs come with the shortest delay first, so that
        if both peers measured, the longer delay overwrites the shorter: a peer that says it is near everybody must not
        come first.
    belief: for some peers, which part of their announced queue counts; for all others, all of it.
    proven: for some peers, the throughput that they have shown: what others claim beyond is limited (`claims.py`). None
        takes every claim as it is.
    are_agreed: for each pair, whether both peers measured it.
    """

    def __init__(
        self,
        offers: Iterable[Offer],
        belief: Mapping[PeerId, float] | None = None,
        standing: StandingOf = unknown,
        proven: Mapping[PeerId, float] | None = None,
    ) -> None:
        # Callers pass peers that failed too, and leave them out only in a plan: what known peers agree on must not
        # depend on our failures.
        found = agreeing([offer for offer in offers if offer.record.state == "online"], standing)
        self.offers = tuple(found)
        records = [offer.record for offer in found]
        self.starts: Indices = np.array([record.span.start for record in records], np.intp)
        self.ends: Indices = np.array([record.span.end for record in records], np.intp)
        claims = [(offer.peer_id, offer.record.throughput) for offer in found]
        rates = [claim for _, claim in claims] if proven is None else believed(claims, standing, proven)
        # As in `Offer.block_s`.
        self.block_s: Floats = 1 / np.maximum(np.array(rates, np.float64), 1.0)
        self.queue_s: Floats = np.array([record.queue_s for record in records])
        if belief is not None:
            self.queue_s *= [belief.get(offer.peer_id, 1.0) for offer in found]
        self.free_tokens: Floats = np.array([record.free_tokens for record in records], np.float64)
        self.uplink: Floats = np.array([record.uplink for record in records])
        self._numbers = {peer_id: n for n, peer_id in enumerate(dict.fromkeys(offer.peer_id for offer in found))}
        self._find_columns()
        self._find_pairs()

    def __len__(self) -> int:
        return len(self.offers)

    def __repr__(self) -> str:
        return f"<OfferTable of {len(self._numbers)} peers, {len(self)} spans>"

    def of(self, peers: Iterable[PeerId]) -> Indices:
        """The columns of these peers, without those that offer nothing."""
        numbers = {self._numbers[peer_id] for peer_id in peers if peer_id in self._numbers}
        return self._columns_of(np.array(sorted(numbers), np.intp))[0]

    def _find_columns(self) -> None:
        """Sort the columns by peer: those of peer n are `_columns[_bounds[n] : _bounds[n + 1]]`."""
        self._peers: Indices = np.array([self._numbers[offer.peer_id] for offer in self.offers], np.intp)
        self._columns: Indices = np.argsort(self._peers, kind="stable")
        self._bounds: Indices = np.searchsorted(self._peers[self._columns], np.arange(len(self._numbers) + 1))

    def _columns_of(self, peers: Indices) -> tuple[Indices, Indices]:
        """The columns of `peers`, one after the other, and for each column the index of its peer in `peers`."""
        counts = self._bounds[peers + 1] - self._bounds[peers]
        source = np.repeat(np.arange(len(peers)), counts)
        within = np.arange(len(source)) - (np.cumsum(counts) - counts)[source]
        return self._columns[self._bounds[peers][source] + within], source

    def _find_pairs(self) -> None:
        told = [rtt for offer in self.offers for rtt in offer.record.rtts]
        one = np.repeat(self._peers, [len(offer.record.rtts) for offer in self.offers])
        numbers = self._numbers
        other: Indices = np.array([numbers.get(peer_id, -1) for peer_id, _ in told], np.intp)
        apart_s: Floats = np.array([rtt_s for _, rtt_s in told]) / 2
        known = np.flatnonzero((other >= 0) & (other != one))
        known = known[np.argsort(apart_s[known], kind="stable")]
        there, back = (first[known] * len(numbers) + second[known] for first, second in ((one, other), (other, one)))
        agreed: Mask = np.isin(there, back)
        near, source = self._columns_of(one[known])
        known, agreed = known[source], agreed[source]
        far, source = self._columns_of(other[known])
        near, apart_s, agreed = near[source], apart_s[known][source], agreed[source]
        twin, own = self._columns_of(self._peers)
        apart = own != twin
        self.near: Indices = np.concatenate([np.stack([near, far], 1).ravel(), own[apart]])
        self.far: Indices = np.concatenate([np.stack([far, near], 1).ravel(), twin[apart]])
        twins = np.count_nonzero(apart)
        self.apart_s: Floats = np.concatenate([np.repeat(apart_s, 2), np.full(twins, np.nan)])
        self.are_agreed: Mask = np.concatenate([np.repeat(agreed, 2), np.ones(twins, bool)])

"""Which peers to chain: the shortest path through the blocks, entering and leaving spans anywhere inside.

Knows offers, delays and costs, all given; knows no clock and sends nothing. The difficulty is size: 1000
peers of 128 blocks have millions of (peer, block) -> (peer, block) edges, and a client waits for the answer.
Blocks are computed in order, so the graph has no cycle and one sweep over the blocks finds what Dijkstra's
queue would. And a change of peers that pays at all pays best where the one span ends or the other
starts: sliding it from there changes the cost linearly. So only those edges are looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from numpy.typing import NDArray

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.records import ServerRecord
from peerd.protocol.span import Span
from peerd.routing.adapters import NO_ADAPTER, AdapterNeed
from peerd.routing.offer import Offer, agreeing

# What a hop costs beside its link: framing, queueing for the engine, copies. Petals reckons with 18 ms.
HOP_S = 0.005
# A peer that was never measured is taken to be on another continent: unknown must not beat known.
UNKNOWN_RTT_S = 0.2
# A peer without the room for the session would make it wait, or refuse: use it only where nobody else can.
NO_ROOM_S = 10.0
# Chains that cost so much more than the best are as good: choosing among them keeps clients from herding.
NEAR_BEST = 1.05
# Sums of the same costs in another order differ by rounding.
_ROUNDING_S = 1e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hop:
    """One place in a chain: a peer, the part of its span that is used, and its place among the hops."""

    index: int
    peer_id: PeerId
    span: Span
    offer: Offer


@dataclass(frozen=True, slots=True)
class Chain:
    """Hops whose spans join up. `cost_s`: the seconds that one position is expected to take, there and back."""

    hops: tuple[Hop, ...]
    cost_s: float


@dataclass(frozen=True, slots=True)
class ChainNeeds:
    """What the client knows and wants.

    rtts_s: seconds to a peer and back, as measured by the client. tokens: KV tokens needed on each hop.
    positions: positions a step, for which computing is weighed against delays. adapter: what hops must have.
    first_by, last_by: who may run the first and the last block; None is anybody.
    """

    rtts_s: Mapping[PeerId, float] = field(default_factory=dict)
    tokens: int = 0
    positions: int = 1
    adapter: AdapterNeed = NO_ADAPTER
    first_by: frozenset[PeerId] | None = None
    last_by: frozenset[PeerId] | None = None


def plan_chain(
    offers: Iterable[Offer],
    span: Span,
    *,
    needs: ChainNeeds,
    random: Random,
    avoid: Collection[PeerId] = (),
) -> Chain:
    """A chain over the blocks of `span` that costs at most 5 % more than the best, chosen at random among such.

    Raises NoChain whose `missing` has the runs of blocks, as (start, end), that no usable offer holds.
    """
    usable = agreeing([offer for offer in offers if _is_usable(offer.record, span) and offer.peer_id not in avoid])
    usable = [offer for offer in usable if needs.adapter.met_by(offer, span)]
    parts = [_Part(o, max(o.span.start, span.start), min(o.span.end, span.end)) for o in usable]
    _check_covered(parts, span, "reachable", needs.adapter)
    if needs.first_by is not None or needs.last_by is not None:
        parts = list(_trusted(parts, span, needs))
        _check_covered(parts, span, "trusted", needs.adapter)
    return _Planner(parts, span, needs).choose(random)


def _is_usable(record: ServerRecord, span: Span) -> bool:
    own = record.span
    return record.state == "online" and own.start < span.end and span.start < own.end


@dataclass(frozen=True, slots=True)
class _Part:
    """The blocks of an offer that it may run in this chain."""

    offer: Offer
    start: int
    end: int


def _trusted(parts: Iterable[_Part], span: Span, needs: ChainNeeds) -> Iterator[_Part]:
    """Who may not run the first or the last block is as good as one that has it not."""
    for part in parts:
        start, end = part.start, part.end
        if needs.first_by is not None and part.offer.peer_id not in needs.first_by:
            start = max(start, span.start + 1)
        if needs.last_by is not None and part.offer.peer_id not in needs.last_by:
            end = min(end, span.end - 1)
        if start < end:
            yield _Part(part.offer, start, end)


def _check_covered(parts: Sequence[_Part], span: Span, who: str, adapter: AdapterNeed) -> None:
    missing: list[tuple[int, int]] = []
    reached = span.start
    for part in sorted(parts, key=lambda part: part.start):
        if part.start > reached:
            missing.append((reached, part.start))
        reached = max(reached, part.end)
    if reached < span.end:
        missing.append((reached, span.end))
    if missing:
        runs = ", ".join(f"{start}:{end}" for start, end in missing)
        raise NoChain(f"nobody {who} serves blocks {runs}{adapter}", tuple(missing))


class _Planner:
    """The sweep's tables, one column an offer.

    reach[b, i]: the least cost of being at offer i when it has just computed the b-th block of the span.
    """

    def __init__(self, parts: Sequence[_Part], span: Span, needs: ChainNeeds) -> None:
        offers = [part.offer for part in parts]
        self._offers = offers
        self._first = span.start
        self._blocks = len(span)
        self._starts = np.array([part.start for part in parts]) - span.start
        self._ends = np.array([part.end for part in parts]) - span.start
        self._block_s: Floats = np.array([offer.block_s * needs.positions for offer in offers])
        self._enter_s: Floats = np.array(
            [HOP_S + (NO_ROOM_S if offer.record.free_tokens < needs.tokens else 0.0) for offer in offers]
        )
        self._client_s: Floats = np.array([needs.rtts_s.get(o.peer_id, UNKNOWN_RTT_S) / 2 for o in offers])
        self._links = _LinkDelays(offers, self._client_s)
        self._reach = self._sweep()

    def choose(self, random: Random) -> Chain:
        """Walk back from the last block, taking at random any offer that leaves the rest affordable."""
        totals = self._reach[self._blocks] + self._client_s
        budget = float(totals.min()) * NEAR_BEST
        at = _pick(totals, budget, random)
        cost_s, budget = self._client_s[at], budget - self._client_s[at]
        runs: list[tuple[int, int, int]] = []
        block = end = self._blocks
        while True:
            block -= 1
            budget -= self._block_s[at]
            cost_s += self._block_s[at]
            # A peer is kept for as long as that is affordable: fewer hops.
            if block > 0 and self._reach[block, at] <= budget + _ROUNDING_S:
                continue
            runs.append((at, block, end))
            cost_s += self._enter_s[at]
            if block == 0:
                break
            budget -= self._enter_s[at]
            link_s = self._links.row(at)
            before = _pick(self._reach[block] + link_s, budget, random)
            budget -= link_s[before]
            cost_s += link_s[before]
            at, end = before, block
        return self._chain(runs[::-1], float(cost_s + self._client_s[at]))

    def _chain(self, runs: list[tuple[int, int, int]], cost_s: float) -> Chain:
        hops = []
        for index, (at, start, end) in enumerate(runs):
            offer = self._offers[at]
            hops.append(Hop(index, offer.peer_id, Span(self._first + start, self._first + end), offer))
        return Chain(tuple(hops), cost_s)

    def _sweep(self) -> Floats:
        reach = np.full((self._blocks + 1, len(self._offers)), np.inf)
        for block in range(self._blocks):
            arrive = self._client_s if block == 0 else self._arrive(reach[block], block)
            best = np.minimum(reach[block], arrive + self._enter_s) + self._block_s
            holds = (self._starts <= block) & (block < self._ends)
            reach[block + 1, holds] = best[holds]
        return reach

    def _arrive(self, reach: Floats, block: int) -> Floats:
        """The least cost of having come to each offer from another one after `block` blocks."""
        arrive: Floats = np.full(len(self._offers), np.inf)
        ending = np.flatnonzero(self._ends == block)
        if ending.size:
            arrive = (reach[ending, None] + self._links.rows(ending)).min(axis=0)
        starting = np.flatnonzero(self._starts == block)
        if starting.size:
            arrive[starting] = np.minimum(arrive[starting], (reach + self._links.rows(starting)).min(axis=1))
        return arrive


class _LinkDelays:
    """Seconds between any two offers' peers: as either measured it, else guessed from the client's own.

    Of 1000 offers there are a million pairs, of which a sweep looks at each once: rows are made when asked for, for
    filling a matrix would take longer than all the rest.
    """

    def __init__(self, offers: Sequence[Offer], client_s: Floats) -> None:
        self._client_s = client_s
        rows, cols, values = _measured(offers)
        # Where both peers measured, the shorter one comes last, and stays when it is written over the other.
        order = np.lexsort((-values, rows))
        rows, self._cols, self._values = rows[order], cols[order], values[order]
        self._bounds = np.searchsorted(rows, np.arange(len(offers) + 1))

    def rows(self, indices: NDArray[np.intp]) -> Floats:
        """From (or to) each offer in `indices` to (or from) every other: `[len(indices), offers]`."""
        # Two peers are about as far from each other as the farther one is from us.
        delays: Floats = np.maximum(self._client_s[indices, None], self._client_s)
        for row, index in enumerate(indices):
            known = slice(self._bounds[index], self._bounds[index + 1])
            delays[row, self._cols[known]] = self._values[known]
        return delays

    def row(self, index: int) -> Floats:
        """From (or to) one offer."""
        delays: Floats = self.rows(np.array([index]))[0]
        return delays


def _measured(offers: Sequence[Offer]) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Pairs of offers whose delay one of their peers measured, both ways round."""
    columns: dict[PeerId, list[int]] = {}
    for index, offer in enumerate(offers):
        columns.setdefault(offer.peer_id, []).append(index)
    rows: list[int] = []
    cols: list[int] = []
    values: list[float] = []
    for row, offer in enumerate(offers):
        for peer_id, rtt_s in ((offer.peer_id, 0.0), *offer.record.rtts):
            for column in columns.get(peer_id, ()):
                rows.append(row)
                cols.append(column)
                values.append(rtt_s / 2)
    return np.array(rows + cols), np.array(cols + rows), np.array(values + values)


def _pick(costs: Floats, budget: float, random: Random) -> int:
    return int(random.choice(np.flatnonzero(costs <= budget + _ROUNDING_S)))

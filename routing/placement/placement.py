"""Which span a server should host: the one that lifts the weakest blocks most, now and while the swarm changes.

Knows offers and block counts; knows neither memory nor disks: how many blocks fit is given. The difficulty is thrash:
every server sees the same swarm a little late, and all could fill the same gap. So a move must pay by a measure that
all share and that each move raises; who moves says so before it does, and looks again before it acts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peerd.protocol.identity import PeerId
from peerd.protocol.records.bodies import MAX_SLOTS
from peerd.protocol.span import Span
from peerd.routing.directory.holding import Holding
from peerd.routing.placement.flow import FlowWithOne

Floats = NDArray[np.float64]

# A move must gain this part of what a server of its speed adds to a swarm that is perfectly even: loading takes
# minutes, and sessions have to find other peers.
LEAST_GAIN = 0.25
# What is on disk already is as good as a place that gains so much less, for a download takes longer than all the rest.
ON_DISK_GAIN = 0.1
# A block without a server counts as if one had a millionth of the slowest server's speed: closing a gap beats all.
_GAP = 1e-6
# Who counts: a newcomer that is still loading does, or several of them would all fill the same gap.
_COUNTED = ("joining", "online")


def block_rates(holdings: Iterable[Holding], block_count: int) -> Floats:
    """For each block, the positions a second that its servers do together.

    Each position passes all blocks of a server's span, so a server gives each the n-th part of its
    throughput. One that was never measured is taken for as fast as the others are in the middle.
    """
    servers = _servers(list(holdings))
    if not servers:
        return np.zeros(block_count)
    starts, ends, shares = np.array([(s.start, s.end, rate / len(s)) for s, rate in servers]).T[:, :, None]
    blocks = np.arange(block_count)
    # Summed server by server: blocks with the same servers have the very same rate.
    rates: Floats = np.where((starts <= blocks) & (blocks < ends), shares, 0.0).sum(axis=0)
    return rates


def choose_span(
    holdings: Iterable[Holding], block_count: int, size: int, on_disk: frozenset[int] = frozenset()
) -> Span:
    """The span of `size` blocks (all, if there are fewer) to serve next to `holdings`, which are without our own.

    Of all such spans, the one whose weakest block is the weakest; where that is equal, the next weakest decides, then
    how many of its blocks are `on_disk` already, and at last the lower start. Raises ValueError unless `size` is
    positive.
    """
    return _weakest(block_rates(_as_announced(holdings), block_count), size, on_disk)


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A server that chooses its first span: who it is, and the slot that is for the span."""

    peer_id: PeerId
    slot: int


def choose_first_span(
    holdings: Sequence[Holding], own: Newcomer, block_count: int, size: int, on_disk: frozenset[int] = frozenset()
) -> Span:
    """`choose_span` where others choose at the same time: all who see the same choose as if one after another.

    `holdings` is the whole swarm. Of those who have not chosen for good, only who comes before `own` by PeerId counts,
    and where it will go is worked out here as it does it itself.
    """
    others = [one for one in holdings if _place(one) != (own.peer_id, own.slot)]
    choosing = _choosing(others)
    typical = _typical_throughput(others)
    rates = block_rates((one for one in _as_announced(others) if _place(one) not in choosing), block_count)
    for place, one in sorted(choosing.items()):
        if place < (own.peer_id, own.slot):
            span = _weakest(rates, len(one.record.span))
            rates[span.start : span.end] += (one.record.throughput or typical) / len(span)
    return _weakest(rates, size, on_disk)


def are_choosing(holdings: Sequence[Holding], own: PeerId) -> bool:
    """Whether other peers choose their first span just now."""
    return any(peer_id != own for peer_id, _ in _choosing(holdings))


def choose_move(
    holdings: Sequence[Holding],
    own: Holding,
    block_count: int,
    *,
    on_disk: frozenset[int] = frozenset(),
    said: Span | None = None,
) -> Span | None:
    """Where the server of `own` should go instead, with as many blocks; None where it should stay.

    `holdings` is the whole swarm, `own` and its intention left out or not. A move never leaves a block without a
    server, and gains at least a quarter of what such a server adds to a swarm that is perfectly even.

    `said`: where it has announced to go. Several may have announced the same; then the first of them by PeerId goes,
    and all others stay, as long as none has begun.
    """
    others = [one for one in holdings if _place(one) != _place(own)]
    goal = _choose_move(_as_announced(others), own, block_count, on_disk)
    if said is None or goal == said:
        return goal
    online = {(one.peer_id, one.record.slot) for one in others if one.record.state == "online"}
    firm = [one for one in others if not (_is_intention(one) and one.peer_id > own.peer_id and _place(one) in online)]
    return said if _choose_move(_as_announced(firm), own, block_count, on_disk) == said else goal


def _choose_move(others: Sequence[Holding], own: Holding, block_count: int, on_disk: frozenset[int]) -> Span | None:
    span = own.record.span
    if not _stay_covered(others, span):
        return None
    size, throughput = len(span), own.record.throughput or _typical_throughput(others)
    ideal = throughput / block_count
    servers = _servers(others)
    flows = FlowWithOne(servers, size, throughput, block_count)
    # What a swarm carries is what counts, but one move seldom changes that: several blocks may be the weakest. So
    # evenness counts too, which every move to weaker blocks raises.
    rates = block_rates(others, block_count)
    gains = _evenness(rates, throughput / size, size) / ideal + _gaps_by_start(rates, size) / size
    gains -= gains[span.start] + flows.solve(span.start) / ideal
    gains[_already_there(on_disk, size, len(gains))] += ON_DISK_GAIN
    while True:
        most = gains + flows.bounds / ideal
        best = int(most.argmax())
        if most[best] < LEAST_GAIN:
            return None
        if flows.is_exact[best]:
            return Span(best, best + size)
        flows.solve(best)


def _weakest(rates: Floats, size: int, on_disk: frozenset[int] = frozenset()) -> Span:
    if size < 1:
        raise ValueError(f"a span has at least one block, not {size}")
    size = min(size, len(rates))
    stored = np.zeros(len(rates))
    stored[[block for block in on_disk if block < len(rates)]] = 1
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(rates, size), axis=1)
    here = np.lib.stride_tricks.sliding_window_view(stored, size).sum(axis=1)
    # Of what is equal the first, which is the lowest start: the sort is stable.
    start = int(np.lexsort((-here, *windows.T[::-1]))[0])
    return Span(start, start + size)


def _gaps_by_start(rates: Floats, size: int) -> Floats:
    """For each start of a span, how many of its blocks nobody else has.

    With two gaps no single move makes the swarm whole, so nothing that it carries would be gained by the first: yet
    somebody has to begin. As no move uncovers a block, this only ever falls for all.
    """
    gaps = np.concatenate(([0.0], np.cumsum(rates == 0)))
    result: Floats = gaps[size:] - gaps[:-size]
    return result


def _is_intention(one: Holding) -> bool:
    return one.record.slot >= MAX_SLOTS and one.record.state == "joining"


def _place(one: Holding) -> tuple[PeerId, int]:
    """Whose span is meant, and the slot that it has or, for an intention, will have."""
    return one.peer_id, one.record.slot % MAX_SLOTS


def _choosing(holdings: Sequence[Holding]) -> dict[tuple[PeerId, int], Holding]:
    """Who has not chosen for good yet, by place. Whoever has a span already only means to move it."""
    intentions = {_place(one): one for one in holdings if _is_intention(one)}
    settled = {_place(one) for one in holdings if not _is_intention(one)}
    return {place: one for place, one in intentions.items() if place not in settled}


def _as_announced(holdings: Iterable[Holding]) -> list[Holding]:
    """The swarm once everybody is where it said it is about to go.

    Had two servers of the same blocks both said so, and then counted on each other to stay, both would go.
    """
    holdings = list(holdings)
    going = {_place(one) for one in holdings if _is_intention(one)}
    return [one for one in holdings if _is_intention(one) or _place(one) not in going]


def _typical_throughput(holdings: Iterable[Holding]) -> float:
    known = [one.record.throughput for one in holdings if one.record.throughput]
    return statistics.median(known) if known else 1.0


def _servers(holdings: Sequence[Holding]) -> list[tuple[Span, float]]:
    """The span and speed of everybody who counts."""
    counted = [one.record for one in holdings if one.record.state in _COUNTED]
    typical = _typical_throughput(holdings)
    return [(record.span, record.throughput or typical) for record in counted]


def _stay_covered(others: Iterable[Holding], span: Span) -> bool:
    """Whether somebody who is online holds each block of the span."""
    held = np.zeros(span.end, dtype=bool)
    for one in others:
        if one.record.state == "online":
            held[one.record.span.start : one.record.span.end] = True
    return bool(held[span.start :].all())


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

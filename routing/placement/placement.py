"""Chooses the span that a server should host: the one that lifts the weakest blocks most.

Decides from holdings (which peer announces which span) and from how many blocks fit. Every server sees the same
swarm a little late, so all of them could fill the same gap and move again and again. So a move must pay by a measure
that all servers share and that every move raises; a server announces its move first and looks again before it acts.
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

# A move must gain this part of what a server of its speed adds to a perfectly even swarm: loading takes minutes, and
# sessions have to find other peers.
LEAST_GAIN = 0.25
# A span that is on disk may gain this much less than another and still win, because a download takes longer than
# everything else.
ON_DISK_GAIN = 0.1
# A block without a server counts as if it had a millionth of the slowest server's speed: closing a gap beats all else.
_GAP = 1e-6
# Servers in these states count. One that is still loading does, or several newcomers would all fill the same gap.
_COUNTED = ("joining", "online")


def block_rates(holdings: Iterable[Holding], block_count: int) -> Floats:
    """For each block, the positions a second that its servers carry together.

    Each position passes all blocks of a server's span, so a server gives each of its n blocks the n-th part of its
    throughput. A server that was never measured counts with the median throughput of the others.
    """
    servers = _servers(list(holdings))
    if not servers:
        return np.zeros(block_count)
    starts, ends, shares = np.array([(s.start, s.end, rate / len(s)) for s, rate in servers]).T[:, :, None]
    blocks = np.arange(block_count)
    # Summed server by server, so that blocks with the same servers get exactly the same rate.
    rates: Floats = np.where((starts <= blocks) & (blocks < ends), shares, 0.0).sum(axis=0)
    return rates


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A server that chooses its first span: its PeerId, and the slot for the span."""

    peer_id: PeerId
    slot: int


def choose_first_span(
    holdings: Sequence[Holding], own: Newcomer, block_count: int, size: int, on_disk: frozenset[int] = frozenset()
) -> Span:
    """The span of `size` blocks (all, if there are fewer) for a newcomer, which chooses as if newcomers did so in turn.

    Of all such spans, the one whose weakest block is the weakest; if that is equal, the next weakest decides, then how
    many of its blocks are `on_disk` already, and at last the lower start. Raises ValueError unless `size` is positive.

    `holdings` is the whole swarm. Among servers that have only announced an intention, those with a smaller (PeerId,
    slot) than `own` come first: this function computes where each of them will go, by the rule that they use
    themselves, and ignores the others.
    """
    others = [one for one in holdings if _slot_of(one) != (own.peer_id, own.slot)]
    choosing = _choosing(others)
    typical = _typical_throughput(others)
    rates = block_rates((one for one in as_announced(others) if _slot_of(one) not in choosing), block_count)
    for slot, one in sorted(choosing.items()):
        if slot < (own.peer_id, own.slot):
            span = _weakest(rates, len(one.record.span))
            rates[span.start : span.end] += (one.record.throughput or typical) / len(span)
    return _weakest(rates, size, on_disk)


def are_choosing(holdings: Sequence[Holding], own: PeerId) -> bool:
    """Whether other peers are choosing their first span now."""
    return any(peer_id != own for peer_id, _ in _choosing(holdings))


def choose_move(
    holdings: Sequence[Holding],
    own: Holding,
    block_count: int,
    *,
    on_disk: frozenset[int] = frozenset(),
    intended: Span | None = None,
) -> Span | None:
    """The span of equal size to which the server of `own` should move; None if it should stay.

    `holdings` is the whole swarm, with or without `own` and its intention. A move never leaves a block without a
    server, and gains at least a quarter of what such a server adds to a perfectly even swarm.

    intended: the span to which this server has announced to move. Several servers may have announced the same; then
    the first of them by PeerId moves and the others stay, unless one has begun.
    """
    others = [one for one in holdings if _slot_of(one) != _slot_of(own)]
    goal = _choose_move(as_announced(others), own, block_count, on_disk)
    if intended is None or goal == intended:
        return goal
    online = {(one.peer_id, one.record.slot) for one in others if one.record.state == "online"}
    firm = [one for one in others if not (_is_intention(one) and one.peer_id > own.peer_id and _slot_of(one) in online)]
    return intended if _choose_move(as_announced(firm), own, block_count, on_disk) == intended else goal


def _choose_move(others: Sequence[Holding], own: Holding, block_count: int, on_disk: frozenset[int]) -> Span | None:
    span = own.record.span
    if not _stay_covered(others, span):
        return None
    size, throughput = len(span), own.record.throughput or _typical_throughput(others)
    ideal = throughput / block_count
    servers = _servers(others)
    flows = FlowWithOne(servers, size, throughput, block_count)
    # The swarm's capacity counts most, but one move seldom changes it, since several blocks may be equally weak. So
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
    # The sort is stable, so of equal spans the one with the lowest start is first.
    start = int(np.lexsort((-here, *windows.T[::-1]))[0])
    return Span(start, start + size)


def _gaps_by_start(rates: Floats, size: int) -> Floats:
    """For each start of a span, how many of its blocks no server has.

    With two gaps no single move makes the swarm whole, so the first move would gain no capacity; but one server has
    to begin. No move uncovers a block, so this number only ever falls for all servers.
    """
    gaps = np.concatenate(([0.0], np.cumsum(rates == 0)))
    result: Floats = gaps[size:] - gaps[:-size]
    return result


def _is_intention(one: Holding) -> bool:
    return one.record.slot >= MAX_SLOTS and one.record.state == "joining"


def _slot_of(one: Holding) -> tuple[PeerId, int]:
    """The peer and the slot of a span; for an intention, the slot that the span has or will have."""
    return one.peer_id, one.record.slot % MAX_SLOTS


def _choosing(holdings: Sequence[Holding]) -> dict[tuple[PeerId, int], Holding]:
    """The intentions of servers without a span, by peer and slot. A server that has a span only means to move it."""
    intentions = {_slot_of(one): one for one in holdings if _is_intention(one)}
    settled = {_slot_of(one) for one in holdings if not _is_intention(one)}
    return {slot: one for slot, one in intentions.items() if slot not in settled}


def as_announced(holdings: Iterable[Holding]) -> list[Holding]:
    """The swarm as it will be after all announced moves.

    Otherwise two servers of the same blocks could both announce to leave, each counting on the other to stay.
    """
    holdings = list(holdings)
    going = {_slot_of(one) for one in holdings if _is_intention(one)}
    return [one for one in holdings if _is_intention(one) or _slot_of(one) not in going]


def _typical_throughput(holdings: Iterable[Holding]) -> float:
    known = [one.record.throughput for one in holdings if one.record.throughput]
    return statistics.median(known) if known else 1.0


def _servers(holdings: Sequence[Holding]) -> list[tuple[Span, float]]:
    """The span and throughput of every server that counts."""
    counted = [one.record for one in holdings if one.record.state in _COUNTED]
    typical = _typical_throughput(holdings)
    return [(record.span, record.throughput or typical) for record in counted]


def _stay_covered(others: Iterable[Holding], span: Span) -> bool:
    """Whether other online servers hold every block of the span."""
    held = np.zeros(span.end, dtype=bool)
    for one in others:
        if one.record.state == "online":
            held[one.record.span.start : one.record.span.end] = True
    return bool(held[span.start :].all())


def _evenness(rates: Floats, share: float, size: int) -> Floats:
    """For each start of a span, the harmonic mean of all blocks' rates once a server adds `share` to each block there.

    A position's time is the sum of its times at all blocks, so this is the speed of a swarm whose servers share
    their time evenly. Among swarms of the same servers, the even one has the greatest.
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

"""Selects the offers that one plan may use, and computes what each of them costs.

All objectives (steps and passes) share these costs. No chain is chosen here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import NO_ADAPTER, AdapterNeed
from peerd.routing.chains.offer_table import Floats, Indices, Mask, OfferTable
from peerd.routing.directory.offer import Offer

# What a hop costs beside its link: framing, queueing for the engine, copies. Petals uses 18 ms.
HOP_S = 0.005
# A peer that was never measured counts as being on another continent: unknown must not beat known.
UNKNOWN_RTT_S = 0.2
# A peer without room for the session would make it wait, or refuse: use it only if no other peer can serve.
NO_ROOM_S = 10.0


@dataclass(frozen=True, slots=True)
class ChainNeeds:
    """What the client knows and wants.

    rtts_s: round-trip seconds to peers, as measured by the client. unknown_rtt_s: to all other peers.
    tokens: KV tokens needed on each hop.
    positions: positions of a step (or of a pass's request), which weigh computing against delays.
    adapter: the adapter that hops must have.
    requests: 0 for a session, whose hops push its steps on to each other; the time from a step to its answer counts.
        For a training pass, how many requests follow each other, each going from the client to a hop and back; the
        time of the last answer counts, so with many requests the slowest hop.
    position_bytes: bytes of one position on the wire.
    first_by, last_by: peers that may run the first and the last block; None means any peer.
    after, before: the peers between which this chain is a part of a longer one; None is the client.
    warm: peers to which a connection is open, which are preferred among equally good chains.
    """

    rtts_s: Mapping[PeerId, float] = field(default_factory=dict)
    tokens: int = 0
    positions: int = 1
    adapter: AdapterNeed = NO_ADAPTER
    first_by: frozenset[PeerId] | None = None
    last_by: frozenset[PeerId] | None = None
    requests: int = 0
    position_bytes: int = 0
    unknown_rtt_s: float = UNKNOWN_RTT_S
    after: PeerId | None = None
    before: PeerId | None = None
    warm: frozenset[PeerId] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The usable offers as columns, ordered by `starts`. Blocks are counted from the first block that is wanted.

    block_s: to compute a step's positions in one block.
    hop_s: a hop's further costs, including its queue.
    client_s: to or from the client, one way.
    to_s, back_s: from the peer before the chain, and to the peer after it (or the client).
    push_s: to send a step's output to the next peer.
    near, far, apart_s: pairs of columns with a measured delay, as in OfferTable.
    """

    offers: list[Offer]
    starts: Indices
    ends: Indices
    block_s: Floats
    hop_s: Floats
    client_s: Floats
    to_s: Floats
    back_s: Floats
    push_s: Floats
    warm: Mask
    near: Indices
    far: Indices
    apart_s: Floats


def select_columns(table: OfferTable, span: Span, needs: ChainNeeds, avoid: Collection[PeerId]) -> Columns:
    """The offers that may be used for some of the blocks of `span`.

    Raises NoChain whose `missing` has the runs of blocks, as (start, end), that none of them holds.
    """
    usable = (table.starts < span.end) & (span.start < table.ends)
    usable[table.of(avoid)] = False
    if needs.adapter != NO_ADAPTER:
        for column in np.flatnonzero(usable):
            usable[column] = needs.adapter.met_by(table.offers[column], span)
    starts = np.maximum(table.starts, span.start) - span.start
    ends = np.minimum(table.ends, span.end) - span.start
    _check_covered(starts[usable], ends[usable], span, "reachable", needs.adapter)
    if needs.first_by is not None or needs.last_by is not None:
        _keep_ends_for(table, needs, starts, ends, len(span))
        usable &= starts < ends
        _check_covered(starts[usable], ends[usable], span, "trusted", needs.adapter)
    chosen = np.flatnonzero(usable)
    return _columns(table, needs, chosen[np.argsort(starts[chosen], kind="stable")], starts, ends)


def _keep_ends_for(table: OfferTable, needs: ChainNeeds, starts: Indices, ends: Indices, blocks: int) -> None:
    """Treat a peer that may not run the first or last block as if its span excluded that block."""
    for trusted, first in ((needs.first_by, True), (needs.last_by, False)):
        if trusted is None:
            continue
        others = np.ones(len(table), bool)
        others[table.of(trusted)] = False
        if first:
            starts[others] = np.maximum(starts[others], 1)
        else:
            ends[others] = np.minimum(ends[others], blocks - 1)


def _check_covered(starts: Indices, ends: Indices, span: Span, who: str, adapter: AdapterNeed) -> None:
    count = len(span) + 1
    uncovered = np.flatnonzero(np.cumsum(np.bincount(starts, minlength=count) - np.bincount(ends, minlength=count)) < 1)
    # The entry behind the last block does not count: there is nothing to hold.
    if len(uncovered) > 1:
        runs = np.split(uncovered[:-1], np.flatnonzero(np.diff(uncovered[:-1]) > 1) + 1)
        missing = tuple((span.start + int(run[0]), span.start + int(run[-1]) + 1) for run in runs)
        named = ", ".join(f"{start}:{end}" for start, end in missing)
        raise NoChain(f"no {who} peer serves blocks {named}{adapter}", missing)


def _columns(table: OfferTable, needs: ChainNeeds, chosen: Indices, starts: Indices, ends: Indices) -> Columns:
    # The position of each of the table's columns among the chosen ones; -1 for the others.
    index = np.full(len(table), -1, np.intp)
    index[chosen] = np.arange(len(chosen))
    pairs = np.flatnonzero((index[table.near] >= 0) & (index[table.far] >= 0))
    rtts, unknown_rtt_s = needs.rtts_s, needs.unknown_rtt_s
    client_s: Floats = np.array([rtts.get(offer.peer_id, unknown_rtt_s) for offer in table.offers]) / 2
    warm = np.zeros(len(table), bool)
    warm[table.of(needs.warm)] = True
    uplink = table.uplink[chosen]
    position_s = np.divide(needs.position_bytes, uplink, out=np.zeros(len(chosen)), where=uplink > 0)
    near, far = index[table.near[pairs]], index[table.far[pairs]]
    apart_s = _plausible(table, needs, client_s, pairs)
    # The last hop of a session sends the client one position; every other hop sends all positions.
    push_s = position_s * needs.positions
    is_last = needs.requests == 0 and needs.before is None
    return Columns(
        offers=[table.offers[column] for column in chosen],
        starts=starts[chosen],
        ends=ends[chosen],
        block_s=table.block_s[chosen] * needs.positions,
        hop_s=HOP_S + table.queue_s[chosen] + np.where(table.free_tokens[chosen] < needs.tokens, NO_ROOM_S, 0.0),
        client_s=client_s[chosen],
        to_s=_delays(table, needs, needs.after, client_s)[chosen],
        back_s=_delays(table, needs, needs.before, client_s)[chosen] + (position_s if is_last else push_s),
        push_s=push_s,
        warm=warm[chosen],
        near=near,
        far=far,
        # Two spans of one peer have no delay between them, and nothing is sent: subtract the sending time again.
        apart_s=np.where(np.isnan(apart_s), -push_s[near], apart_s),
    )


def _plausible(table: OfferTable, needs: ChainNeeds, client_s: Floats, pairs: Indices) -> Floats:
    """The announced delays of these pairs. One that a single peer announces is at least the difference of what we
    measured to both: no way is shorter than that through a third place allows.
    """
    is_measured = np.array([offer.peer_id in needs.rtts_s for offer in table.offers], bool)
    near, far = table.near[pairs], table.far[pairs]
    is_checked = ~table.are_agreed[pairs] & is_measured[near] & is_measured[far]
    least = np.where(is_checked, np.abs(client_s[near] - client_s[far]), 0.0)
    return np.maximum(table.apart_s[pairs], least)


def _delays(table: OfferTable, needs: ChainNeeds, peer_id: PeerId | None, client_s: Floats) -> Floats:
    """One-way delays between every offer's peer and `peer_id`; None is the client."""
    if peer_id is None:
        return client_s
    delays: Floats = np.maximum(client_s, needs.rtts_s.get(peer_id, needs.unknown_rtt_s) / 2)
    own = table.of([peer_id])
    pairs = np.flatnonzero(np.isin(table.near, own))
    delays[table.far[pairs]] = np.nan_to_num(_plausible(table, needs, client_s, pairs), nan=0.0)
    delays[own] = 0.0
    return delays

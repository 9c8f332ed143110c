"""How much a swarm can do: the positions a second that its servers together carry through all blocks.

Knows spans and speeds; knows no peers. A server spreads its time over the blocks of its span as it likes, so the most
that a swarm carries is a maximum flow. Spans are intervals, which makes the minimum cut small to find: a set of
blocks can carry no more than all servers that hold any of them, and one pass over pairs of blocks finds the set
that is worst off.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from peerd.protocol.span import Span

Floats = NDArray[np.float64]
# Each round of the search takes the worst set found as the next bound; three or four suffice, and it never cycles.
_MAX_ROUNDS = 50
_PRECISION = 1e-9


def swarm_flow(servers: Iterable[tuple[Span, float]], block_count: int) -> float:
    """The positions a second through all blocks. `servers`: each one's span, and its positions a second of one block.

    0 where some block has no server.
    """
    return float(_flows(_cut_costs(servers, block_count)[None])[0])


def flows_with(servers: Iterable[tuple[Span, float]], size: int, throughput: float, block_count: int) -> Floats:
    """For each start of a span of `size` blocks, the flow once another server of that throughput holds it."""
    starts = np.arange(block_count - size + 1)[:, None, None]
    first, last = np.arange(-1, block_count)[:, None], np.arange(block_count)
    # Between blocks j < k of a set, it adds what begins after j and holds k.
    joins = (first < starts) & (starts <= last) & (last < starts + size)
    return _flows(_cut_costs(servers, block_count) + throughput * joins)


def _flows(costs: Floats) -> Floats:
    """The flow for each of several swarms `[swarms, 1 + j, k]`, by Dinkelbach's rounds from the whole model."""
    blocks = costs.shape[2]
    flows: Floats = (costs[:, 0, 0] + np.trace(costs[:, 1:], offset=1, axis1=1, axis2=2)) / blocks
    for _ in range(_MAX_ROUNDS):
        capacities, sizes = _worst_sets(costs, flows)
        lower = capacities / np.maximum(sizes, 1)
        worse = (sizes > 0) & (lower < flows * (1 - _PRECISION))
        if not worse.any():
            break
        flows = np.where(worse, lower, flows)
    return flows


def _cut_costs(servers: Iterable[tuple[Span, float]], block_count: int) -> Floats:
    """`[1 + j, k]`: what the servers that hold block k, but not block j < k of the set, add to the set's capacity.

    Row 0 is for a set that begins with k.
    """
    by_ends = np.zeros((block_count + 1, block_count + 1))
    for span, throughput in servers:
        if span.start < block_count:
            by_ends[span.start, min(span.end, block_count)] += throughput
    # [s, k]: of all servers whose span starts at s, those that hold block k.
    holding = by_ends.sum(axis=1, keepdims=True) - by_ends.cumsum(axis=1)
    up_to = holding[:block_count, :block_count].cumsum(axis=0)
    own = np.diagonal(up_to)
    return np.concatenate((own[None], own[None] - up_to))


def _worst_sets(costs: Floats, flows: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """For each swarm the blocks whose servers fall furthest short of `flow` for each: their capacity, and how many."""
    swarms, _, blocks = costs.shape
    short: Floats = np.empty((swarms, blocks))
    sizes = np.empty((swarms, blocks), dtype=np.intp)
    each = np.arange(swarms)
    for block in range(blocks):
        # Row 0 begins a set with this block; row 1 + j adds it to the worst set that ends with block j.
        choices = costs[:, : block + 1, block].copy()
        choices[:, 1:] += short[:, :block]
        least = choices.argmin(axis=1)
        short[:, block] = choices[each, least] - flows
        sizes[:, block] = 1 + np.where(least > 0, sizes[each, least - 1], 0)
    at = short.argmin(axis=1)
    count = sizes[each, at]
    return short[each, at] + flows * count, count

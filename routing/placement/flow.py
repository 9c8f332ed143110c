"""Computes a swarm's capacity: the positions a second that its servers together carry through all blocks.

A server spreads its time over the blocks of its span as it likes, so the capacity is a maximum flow, which equals a
minimum cut: a set of blocks carries no more than all servers that hold any of its blocks. Spans are intervals, so
one pass over pairs of blocks finds the set with the least capacity for each of its blocks.

`FlowWithOne` tries one more server at every start. Solving for each start would be slow, but the worst set of one
trial bounds all others, and a start whose bound is low need not be solved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peerd.protocol.span import Span

Floats = NDArray[np.float64]
# Each round takes the worst set found as the next bound. Three or four rounds suffice, and it never cycles.
_MAX_ROUNDS = 50
_PRECISION = 1e-9


def swarm_flow(servers: Iterable[tuple[Span, float]], block_count: int) -> float:
    """The positions a second that pass through all blocks; 0 if some block has no server.

    servers: for each server, its span and the positions a second that it carries through one block.
    """
    costs = _cut_costs(servers, block_count)
    worst = _cut(costs, np.arange(block_count))
    for _ in range(_MAX_ROUNDS):
        found = _worst_set(costs, worst.flow)
        if not found.flow < worst.flow * (1 - _PRECISION):
            break
        worst = found
    return worst.flow


class FlowWithOne:
    """The flow after one more server, with `size` blocks and this throughput, joins at a given start.

    `bounds[start]` is never less than that flow; `is_exact[start]` says whether it equals it. `solve` makes it
    exact.
    """

    def __init__(self, servers: Iterable[tuple[Span, float]], size: int, throughput: float, block_count: int) -> None:
        self._costs = _cut_costs(servers, block_count)
        self._size = size
        self._throughput = throughput
        self._starts = np.arange(block_count - size + 1)
        self.bounds: Floats = np.full(len(self._starts), np.inf)
        self.is_exact = np.zeros(len(self._starts), dtype=bool)
        self._bound_by(_cut(self._costs, np.arange(block_count)))
        # Without the server the flow is at most as large, and exactly as large if its span misses the worst set of all.
        least = self._solve(self._costs, float(self.bounds.max()))
        self.is_exact = self.bounds <= least

    def solve(self, start: int) -> float:
        """The flow with the server at `start`. The bounds of other starts may fall."""
        if not self.is_exact[start]:
            # For neighbours j < k in a set, the server adds its throughput if its span begins after j and holds k.
            first, last = np.arange(-1, len(self._costs)), np.arange(len(self._costs))[:, None]
            joins = (first < start) & (start <= last) & (last < start + self._size)
            self.bounds[start] = self._solve(self._costs + self._throughput * joins, float(self.bounds[start]))
            self.is_exact[start] = True
        return float(self.bounds[start])

    def _solve(self, costs: Floats, flow: float) -> float:
        """The flow of a swarm with these costs, by Dinkelbach's rounds downwards from `flow`, which is at least as
        large.
        """
        for _ in range(_MAX_ROUNDS):
            worst = _worst_set(costs, flow)
            self._bound_by(worst)
            if not worst.flow < flow * (1 - _PRECISION):
                break
            flow = worst.flow
        return flow

    def _bound_by(self, found: _Cut) -> None:
        """Lower the bounds to the flow that the set allows with the server at each start."""
        members = np.zeros(len(self._costs) + 1)
        members[1 + found.blocks] = 1
        before = members.cumsum()
        touches = before[self._starts + self._size] > before[self._starts]
        without = _cut(self._costs, found.blocks).flow
        bounds = without + self._throughput / len(found.blocks) * touches
        self.bounds = np.where(self.is_exact, self.bounds, np.minimum(self.bounds, bounds))


@dataclass(frozen=True, slots=True)
class _Cut:
    """A set of blocks, in order, and the flow that it allows."""

    blocks: NDArray[np.intp]
    flow: float


def _cut_costs(servers: Iterable[tuple[Span, float]], block_count: int) -> Floats:
    """`[k, 1 + j]`: the throughput of the servers that hold block k, but not the set's block j < k before it.

    Column 0 is for a set that begins with block k.
    """
    by_ends = np.zeros((block_count + 1, block_count + 1))
    for span, throughput in servers:
        if span.start < block_count:
            by_ends[span.start, min(span.end, block_count)] += throughput
    # [s, k]: the throughput of the servers whose span starts at s and holds block k.
    holding = by_ends.sum(axis=1, keepdims=True) - by_ends.cumsum(axis=1)
    up_to = holding[:block_count, :block_count].cumsum(axis=0)
    own = np.diagonal(up_to)
    return np.ascontiguousarray(np.concatenate((own[None], own[None] - up_to)).T)


def _cut(costs: Floats, blocks: NDArray[np.intp]) -> _Cut:
    """The flow that the set of `blocks`, in order, allows."""
    before = np.concatenate(([0], 1 + blocks[:-1]))
    return _Cut(blocks, float(costs[blocks, before].sum()) / len(blocks))


def _worst_set(costs: Floats, flow: float) -> _Cut:
    """The set of blocks whose servers fall furthest short of `flow` for each block."""
    count = len(costs)
    short: Floats = np.empty(count + 1)
    short[0] = 0.0
    before = np.empty(count, dtype=np.intp)
    for block in range(count):
        # Column 0 begins a set with this block; column 1 + j adds the block to the worst set that ends with block j.
        choices = costs[block, : block + 1] + short[: block + 1]
        at = choices.argmin()
        before[block] = at - 1
        short[block + 1] = choices[at] - flow
    block = int(short[1:].argmin())
    blocks = [block]
    while (block := int(before[block])) >= 0:
        blocks.append(block)
    return _cut(costs, np.array(blocks[::-1]))

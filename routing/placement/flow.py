"""How much a swarm can do: the positions a second that its servers together carry through all blocks.

Knows spans and speeds; knows no peers. A server spreads its time over the blocks of its span as it likes, so the most
that a swarm carries is a maximum flow. Spans are intervals, which makes the minimum cut small to find: a set of
blocks can carry no more than all servers that hold any of them, and one pass over pairs of blocks finds the set
that is worst off.

The difficulty is to try one more server at every place without solving for each. But a set that is worst off in one
trial bounds all others, and a place whose bound is low need not be solved at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    costs = _cut_costs(servers, block_count)
    worst = _cut(costs, np.arange(block_count))
    for _ in range(_MAX_ROUNDS):
        found = _worst_set(costs, worst.flow)
        if not found.flow < worst.flow * (1 - _PRECISION):
            break
        worst = found
    return worst.flow


class FlowWithOne:
    """The flow once another server, of `size` blocks and that throughput, holds the span that begins at a start.

    `bounds`, by start, is never less than that; `is_exact` says where it is just that, and `solve` makes it so.
    """

    def __init__(self, servers: Iterable[tuple[Span, float]], size: int, throughput: float, block_count: int) -> None:
        self._costs = _cut_costs(servers, block_count)
        self._size = size
        self._throughput = throughput
        self._starts = np.arange(block_count - size + 1)
        self.bounds: Floats = np.full(len(self._starts), np.inf)
        self.is_exact = np.zeros(len(self._starts), dtype=bool)
        self._bound_by(_cut(self._costs, np.arange(block_count)))
        # Without the server there is as much, wherever it stands; and no more where it misses the worst set of all.
        least = self._solve(self._costs, float(self.bounds.max()))
        self.is_exact = self.bounds <= least

    def solve(self, start: int) -> float:
        """The flow with the server there. Other starts' bounds may fall."""
        if not self.is_exact[start]:
            # Between blocks j < k of a set, it adds what begins after j and holds k.
            first, last = np.arange(-1, len(self._costs)), np.arange(len(self._costs))[:, None]
            joins = (first < start) & (start <= last) & (last < start + self._size)
            self.bounds[start] = self._solve(self._costs + self._throughput * joins, float(self.bounds[start]))
            self.is_exact[start] = True
        return float(self.bounds[start])

    def _solve(self, costs: Floats, flow: float) -> float:
        """The flow of a swarm with these costs, by Dinkelbach's rounds from what is no less than it."""
        for _ in range(_MAX_ROUNDS):
            worst = _worst_set(costs, flow)
            self._bound_by(worst)
            if not worst.flow < flow * (1 - _PRECISION):
                break
            flow = worst.flow
        return flow

    def _bound_by(self, found: _Cut) -> None:
        """What the set lets through with the server anywhere."""
        members = np.zeros(len(self._costs) + 1)
        members[1 + found.blocks] = 1
        before = members.cumsum()
        touches = before[self._starts + self._size] > before[self._starts]
        without = _cut(self._costs, found.blocks).flow
        bounds = without + self._throughput / len(found.blocks) * touches
        self.bounds = np.where(self.is_exact, self.bounds, np.minimum(self.bounds, bounds))


@dataclass(frozen=True, slots=True)
class _Cut:
    """A set of blocks, in order, and the flow that it lets through."""

    blocks: NDArray[np.intp]
    flow: float


def _cut_costs(servers: Iterable[tuple[Span, float]], block_count: int) -> Floats:
    """`[k, 1 + j]`: what the servers that hold block k, but not block j < k of the set, add to the set's capacity.

    Column 0 is for a set that begins with k.
    """
    by_ends = np.zeros((block_count + 1, block_count + 1))
    for span, throughput in servers:
        if span.start < block_count:
            by_ends[span.start, min(span.end, block_count)] += throughput
    # [s, k]: of all servers whose span starts at s, those that hold block k.
    holding = by_ends.sum(axis=1, keepdims=True) - by_ends.cumsum(axis=1)
    up_to = holding[:block_count, :block_count].cumsum(axis=0)
    own = np.diagonal(up_to)
    return np.ascontiguousarray(np.concatenate((own[None], own[None] - up_to)).T)


def _cut(costs: Floats, blocks: NDArray[np.intp]) -> _Cut:
    """A set of blocks, in order."""
    before = np.concatenate(([0], 1 + blocks[:-1]))
    return _Cut(blocks, float(costs[blocks, before].sum()) / len(blocks))


def _worst_set(costs: Floats, flow: float) -> _Cut:
    """The blocks whose servers fall furthest short of `flow` for each."""
    count = len(costs)
    short: Floats = np.empty(count + 1)
    short[0] = 0.0
    before = np.empty(count, dtype=np.intp)
    for block in range(count):
        # Column 0 begins a set with this block; column 1 + j adds it to the worst set that ends with block j.
        choices = costs[block, : block + 1] + short[: block + 1]
        at = choices.argmin()
        before[block] = at - 1
        short[block + 1] = choices[at] - flow
    block = int(short[1:].argmin())
    blocks = [block]
    while (block := int(before[block])) >= 0:
        blocks.append(block)
    return _cut(costs, np.array(blocks[::-1]))

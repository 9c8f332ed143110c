"""Plans the chain with the soonest answer to a session's steps, whose hops push them on to each other.

Speed matters: 1000 peers with 128 blocks have millions of (peer, block) -> (peer, block) edges, and a client waits.
Blocks are computed in order, so the graph has no cycle, and one sweep over the blocks finds what Dijkstra's queue
would. A change of peers that pays at all pays best where one span ends or the other starts, because moving it from
there changes the cost linearly. So only those edges are looked at, and only between peers that hold the blocks on
both sides. (A peer that only serves as a short cut between two others may be missed. That needs guessed delays: with
measured ones the direct way is the shortest.)
"""

from __future__ import annotations

from random import Random

import numpy as np

from peerd.routing.chains.costs import Columns
from peerd.routing.chains.offer_table import Floats, Indices

# Sums of the same costs in another order differ by rounding.
ROUNDING_S = 1e-9

Run = tuple[int, int, int]
"""A column, and the blocks `[start, end)` that it runs."""


def fastest_for_steps(columns: Columns, blocks: int, slack: float, random: Random) -> tuple[list[Run], float]:
    """Runs over `blocks` that cost at most `slack` times the least cost, chosen at random, and their cost in
    seconds.
    """
    sweep = _Sweep(columns, blocks)
    return sweep.choose(slack, random)


class _Sweep:
    """reach[b, i]: the least cost of having computed the first b blocks with column i computing the last of them."""

    def __init__(self, columns: Columns, blocks: int) -> None:
        self._columns = columns
        self._blocks = blocks
        self._by_end = np.argsort(columns.ends, kind="stable")
        self._end_bounds = np.searchsorted(columns.ends[self._by_end], np.arange(blocks + 1)).tolist()
        self._reach: Floats = np.full((blocks + 1, len(columns.offers)), np.inf)
        self._run()

    def _run(self) -> None:
        columns, reach, by_end = self._columns, self._reach, self._by_end
        client_s, push_s, block_s = columns.client_s, columns.push_s, columns.block_s
        numbers = np.arange(self._blocks + 1)
        # How many columns start before each block; and the first column that ends behind it.
        starting = np.searchsorted(columns.starts, numbers)
        lasting = np.searchsorted(np.maximum.accumulate(columns.ends), numbers, side="right")
        leaving = _leaving(columns, by_end, self._end_bounds, lasting[:-1], starting[1:])
        coming = _coming(columns, starting, lasting)
        started, first = starting.tolist(), lasting.tolist()
        away_s = client_s[:, None]
        # A column whose span has ended cannot be entered any more.
        hop_s = columns.hop_s.copy()
        head = slice(0, started[1])
        reach[1, head] = columns.to_s[head] + hop_s[head] + block_s[head]
        for block in range(1, self._blocks):
            begin, end = first[block], started[block + 1]
            ending = by_end[self._end_bounds[block] : self._end_bounds[block + 1]]
            before, after, here = reach[block], reach[block + 1], slice(begin, end)
            gone = before + push_s
            arrive = after[here]
            if ending.size:
                delays = np.maximum(away_s[ending], client_s[here])
                leaving.write(block, delays)
                delays += gone[ending, None]
                np.minimum.reduce(delays, axis=0, out=arrive)
                hop_s[ending] = np.inf
            new = started[block]
            if new < end:
                there = slice(first[block - 1], new)
                delays = np.maximum(away_s[new:end], client_s[there])
                coming.write(block, delays)
                delays += gone[there]
                fresh = after[new:end]
                np.minimum(fresh, np.minimum.reduce(delays, axis=1), out=fresh)
            arrive += hop_s[here]
            np.minimum(arrive, before[here], out=arrive)
            arrive += block_s[here]
            after[ending] = np.inf

    def choose(self, slack: float, random: Random) -> tuple[list[Run], float]:
        """Walk back from the last block, taking at random any column that leaves the rest affordable."""
        columns, reach = self._columns, self._reach
        totals = reach[self._blocks] + columns.back_s
        budget = float(totals.min()) * slack
        at = self._pick(totals, budget, random)
        cost_s, budget = columns.back_s[at], budget - columns.back_s[at]
        runs: list[Run] = []
        block = end = self._blocks
        while True:
            block -= 1
            budget -= columns.block_s[at]
            cost_s += columns.block_s[at]
            # Stay with a peer as long as that is affordable, which makes fewer hops.
            if block > 0 and reach[block, at] <= budget + ROUNDING_S:
                continue
            runs.append((at, block, end))
            cost_s += columns.hop_s[at]
            if block == 0:
                break
            budget -= columns.hop_s[at]
            link_s = self._links_to(at)
            before = self._pick(reach[block] + link_s, budget, random)
            budget -= link_s[before]
            cost_s += link_s[before]
            at, end = before, block
        return runs[::-1], float(cost_s + columns.to_s[at])

    def _links_to(self, at: int) -> Floats:
        """The seconds that a step takes to get to a column from each of the others."""
        columns = self._columns
        # Without a measurement, two peers count as far from each other as the farther one is from the client.
        links: Floats = np.maximum(columns.client_s, columns.client_s[at])
        known = np.flatnonzero(columns.far == at)
        links[columns.near[known]] = columns.apart_s[known]
        links += columns.push_s
        return links

    def _pick(self, costs: Floats, budget: float, random: Random) -> int:
        near_best = np.flatnonzero(costs <= budget + ROUNDING_S)
        warm = near_best[self._columns.warm[near_best]]
        return int(random.choice(warm if len(warm) else near_best))


class _Measured:
    """Measured delays, by the block at which the sweep needs them.

    1000 offers form a million pairs; the sweep looks at each once, and some thousand are measured. So all delays are
    guessed, a few rows at a time, and the measured ones are written over the guesses.

    blocks, rows, cols: for each delay, the block at which it is needed and its position in that block's matrix.
    """

    def __init__(self, blocks: Indices, rows: Indices, cols: Indices, apart_s: Floats, count: int) -> None:
        # 16-bit values are sorted by counting, which is fast for few values.
        order = np.argsort(blocks.astype(np.int16), kind="stable")
        self._bounds = np.searchsorted(blocks[order], np.arange(count + 1)).tolist()
        self._rows, self._cols, self._apart_s = rows[order], cols[order], apart_s[order]

    def write(self, block: int, delays: Floats) -> None:
        """Write the measured delays of a block into its matrix."""
        begin, end = self._bounds[block], self._bounds[block + 1]
        if begin < end:
            delays[self._rows[begin:end], self._cols[begin:end]] = self._apart_s[begin:end]


def _leaving(columns: Columns, by_end: Indices, bounds: list[int], begins: Indices, ends: Indices) -> _Measured:
    """From columns that end at a block to columns that hold it, which are those from `begins` to `ends`."""
    rank = np.empty(len(by_end), np.intp)
    rank[by_end] = np.arange(len(by_end))
    block = columns.ends[columns.near]
    known = np.flatnonzero(block < len(begins))
    known = known[(columns.far[known] >= begins[block[known]]) & (columns.far[known] < ends[block[known]])]
    near, far, block = columns.near[known], columns.far[known], block[known]
    rows = rank[near] - np.array(bounds)[block]
    return _Measured(block, rows, far - begins[block], columns.apart_s[known], len(begins))


def _coming(columns: Columns, starting: Indices, lasting: Indices) -> _Measured:
    """To columns that start at a block from columns that hold the block before it."""
    block = columns.starts[columns.far]
    known = np.flatnonzero(block > 0)
    begins, ends = lasting[block[known] - 1], starting[block[known]]
    inside = (columns.near[known] >= begins) & (columns.near[known] < ends)
    known, begins = known[inside], begins[inside]
    near, far, block = columns.near[known], columns.far[known], block[known]
    return _Measured(block, far - starting[block], near - begins, columns.apart_s[known], len(starting) - 1)

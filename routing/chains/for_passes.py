"""Plans chains for training passes, in which the client sends each hop its input and gets its output back.

For one request the soonest answer counts. No hop's cost depends on its neighbours, so a sweep over the blocks finds
it. With many requests behind each other the slowest peer sets the pace: the last answer comes one chain's time and
(requests - 1) paces after the first was sent. A peer that runs two parts of a chain works for both, which no sum
over hops shows. So a search goes from hop to hop, marks the spans that are used, tries the likeliest first, and
gives up after a number of tries.
"""

from __future__ import annotations

from bisect import bisect_left
from random import Random

import numpy as np

from peerd.routing.chains.costs import Columns
from peerd.routing.chains.for_steps import ROUNDING_S, Run
from peerd.routing.chains.offer_table import Floats, Indices

# How many hops a search may try for one pace. With few peers that covers everything; with many, the first try succeeds
# or the pace is far too fast.
MAX_TRIES = 256
# How many paces between the best and that of the soonest answer are tried, and how many chains for each.
PACES = 6
CHAINS = 2
# For each block only so many of the fastest and so many of the nearest peers are searched: others would not make a
# faster chain.
PEERS_A_BLOCK = 16


def fastest_for_passes(
    columns: Columns, blocks: int, requests: int, slack: float, random: Random
) -> tuple[list[Run], float, float]:
    """The runs over `blocks`, the seconds until one request is answered, and the slowest peer's seconds for each
    request.
    """
    found = [_soonest(columns, blocks, slack, random)]
    if requests > 1:
        found += _Paces(columns, blocks, slack, random).chains(_times(columns, found[0])[1])

    def until_last(runs: list[Run]) -> float:
        total_s, slowest_s = _times(columns, runs)
        return total_s + (requests - 1) * slowest_s

    best = min(found, key=until_last)
    return best, *_times(columns, best)


def _times(columns: Columns, runs: list[Run]) -> tuple[float, float]:
    """The seconds until one request is answered, and the slowest peer's seconds for each request."""
    busy_s: dict[int, float] = {}
    for at, start, end in runs:
        busy_s[at] = busy_s.get(at, 0.0) + float(_stage_s(columns, at, end - start))
    return sum(_run_s(columns, run) for run in runs), max(busy_s.values())


def _run_s(columns: Columns, run: Run) -> float:
    """The seconds that a hop adds to one request."""
    at, start, end = run
    return float(columns.to_s[at] + columns.hop_s[at] + (end - start) * columns.block_s[at] + columns.back_s[at])


def _stage_s(columns: Columns, at: int | Indices, count: int | Indices) -> Floats:
    """The seconds that a hop takes for each of many requests: it computes one while it sends the one before."""
    stage_s: Floats = np.maximum(columns.hop_s[at] + count * columns.block_s[at], columns.push_s[at])
    return stage_s


def _soonest(columns: Columns, blocks: int, slack: float, random: Random) -> list[Run]:
    hop_s = columns.to_s + columns.hop_s + columns.back_s
    best = np.full(blocks + 1, np.inf)
    best[0] = 0.0

    def costs(end: int) -> tuple[Indices, Floats]:
        """The columns that can run the block before `end`, and the total cost for each block at which such a run can
        begin.
        """
        holders = np.flatnonzero((columns.starts < end) & (columns.ends >= end))
        begins = np.arange(end)
        total = best[:end] + (end - begins) * columns.block_s[holders, None] + hop_s[holders, None]
        return holders, np.where(begins < columns.starts[holders, None], np.inf, total)

    for end in range(1, blocks + 1):
        best[end] = costs(end)[1].min()
    budget = best[blocks] * slack
    runs: list[Run] = []
    end = blocks
    while end > 0:
        holders, totals = costs(end)
        near_best = totals <= budget + ROUNDING_S
        pick = random.choice(np.flatnonzero(near_best.any(axis=1)).tolist())
        # Stay with a peer as long as that is affordable, which makes fewer hops.
        at, start = int(holders[pick]), int(np.argmax(near_best[pick]))
        budget -= totals[pick, start] - best[start]
        runs.append((at, start, end))
        end = start
    return runs[::-1]


class _Paces:
    """Searches chains in which no hop takes longer than a given time and no span is used twice."""

    def __init__(self, columns: Columns, blocks: int, slack: float, random: Random) -> None:
        self._columns = columns
        self._blocks = blocks
        # Random, to break near ties.
        self._random = random
        self._slack = slack
        self._hop_s = columns.to_s + columns.hop_s + columns.back_s
        self._lengths = columns.ends - columns.starts
        self._holders = self._best_holders()
        self._taken = np.zeros(len(self._lengths), bool)
        self._tries = 0

    def _best_holders(self) -> list[Indices]:
        """For each block, the columns of the peers that are searched."""
        columns = self._columns
        numbers = np.arange(self._blocks)
        chosen = np.zeros((len(columns.starts), self._blocks), bool)
        for score in (columns.block_s, columns.block_s + self._hop_s / self._lengths):
            order = np.argsort(score * self._taste())
            holds = (columns.starts[order, None] <= numbers) & (numbers < columns.ends[order, None])
            chosen[order] |= holds & (np.cumsum(holds, axis=0) <= PEERS_A_BLOCK)
        return [np.flatnonzero(chosen[:, block]) for block in numbers]

    def _taste(self) -> Floats:
        return np.array([self._random.uniform(1.0, self._slack) for _ in self._lengths])

    def chains(self, slowest_s: float) -> list[list[Run]]:
        """Chains of the best pace, and of paces between that and `slowest_s`."""
        columns, slack = self._columns, self._slack
        searched = np.unique(np.concatenate(self._holders))
        lengths = self._lengths[searched]
        at = np.repeat(searched, lengths)
        count = np.arange(len(at)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
        # The slowest hop's time is the time of some peer for some number of blocks, so only these paces can be the
        # best.
        paces: list[float] = np.unique(_stage_s(columns, at, count)).tolist()
        furthest = np.zeros(len(self._lengths))
        best = bisect_left(range(len(paces) - 1), True, key=lambda n: self._chain(paces[n], furthest) is not None)
        found = [self._chain(paces[best], furthest)]
        for pace_s in np.geomspace(paces[best] * slack, max(slowest_s, paces[best] * slack), PACES).tolist():
            found += [self._chain(pace_s, self._hop_s * self._taste()) for _ in range(CHAINS)]
        return [runs for runs in found if runs is not None]

    def _chain(self, pace_s: float, overhead_s: Floats) -> list[Run] | None:
        """A chain of that pace; peers with the least `overhead_s` for each block that they run are tried first."""
        columns = self._columns
        with np.errstate(divide="ignore"):
            most = np.floor((pace_s + ROUNDING_S - columns.hop_s) / columns.block_s)
        most[columns.push_s > pace_s + ROUNDING_S] = 0
        self._tries = MAX_TRIES
        self._taken[:] = False
        runs: list[Run] = []
        most = np.clip(most, 0, self._blocks).astype(np.intp)
        return runs if self._extend(0, most, overhead_s, runs) else None

    def _extend(self, block: int, most: Indices, overhead_s: Floats, runs: list[Run]) -> bool:
        """Add runs from `block` to the end. Returns False, adding none, if there are none or the tries are used up."""
        if block == self._blocks:
            return True
        holders = self._holders[block]
        # Running further never hurts: the next peer may begin further on as well.
        reached = np.minimum(block + most[holders], self._columns.ends[holders])
        useful = np.flatnonzero((reached > block) & ~self._taken[holders])
        each_s = overhead_s[holders[useful]] / (reached[useful] - block)
        for index in useful[np.lexsort((-reached[useful], each_s))].tolist():
            if self._tries == 0:
                return False
            self._tries -= 1
            at, end = int(holders[index]), int(reached[index])
            self._taken[at] = True
            runs.append((at, block, end))
            if self._extend(end, most, overhead_s, runs):
                return True
            runs.pop()
            self._taken[at] = False
        return False

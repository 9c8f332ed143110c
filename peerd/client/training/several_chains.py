"""Decides over how many chains the requests of a training pass go.

One chain can use many peers, each for a few blocks. If peers hold whole copies of a chain, several chains side by side
need fewer hops for each request: less travels, and no hop waits until the first request has come through all others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.routing.chains.chain import Chain

# Each chain is planned anew and needs lanes of its own, with the client's parameters on them.
MAX_CHAINS = 4


@dataclass(frozen=True, slots=True)
class Share:
    """A chain, and how many of the requests it gets."""

    chain: Chain
    requests: int


def plan_several(alone: Chain, requests: int, plan: Callable[[Collection[PeerId]], Chain]) -> list[Share]:
    """The chains that together answer `requests` requests soonest, without a peer in common; or `alone`.

    `plan` returns the chain that answers one request soonest without some peers; it raises NoChain.
    """
    if requests < 2:
        return [Share(alone, requests)]
    chains: list[Chain] = []
    used: set[PeerId] = set()
    while len(chains) < min(requests, MAX_CHAINS):
        try:
            chains.append(plan(used))
        except NoChain:
            break
        used |= {hop.peer_id for hop in chains[-1].hops}
    counts, last_s = share_out(requests, chains)
    shares = [Share(chain, count) for chain, count in zip(chains, counts, strict=True) if count]
    if len(shares) > 1 and last_s < alone.cost_s + (requests - 1) * alone.slowest_s:
        return shares
    return [Share(alone, requests)]


def share_out(requests: int, chains: Sequence[Chain]) -> tuple[list[int], float]:
    """How many of the requests each chain gets if each request goes where it is answered soonest, and the seconds until
    the last answer.
    """
    counts, last_s = [0] * len(chains), 0.0
    soonest = [(chain.cost_s, index) for index, chain in enumerate(chains)]
    heapq.heapify(soonest)
    for _ in range(requests if chains else 0):
        answered_s, index = soonest[0]
        counts[index] += 1
        last_s = max(last_s, answered_s)
        heapq.heapreplace(soonest, (answered_s + chains[index].slowest_s, index))
    return counts, last_s

"""Keeps one network from being everybody that a peer knows: keys are free, addresses are not.

Whoever makes 10,000 keys in half a second stands nearer to a key than all of a thousand honest peers. So of one public
network (IPv4 /24, IPv6 /48) two peers count, wherever peers are counted, as long as there are others to take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Placed(Protocol):
    """A peer in a public network; "" for none."""

    network: str


P = TypeVar("P", bound=Placed)

# As in libp2p's and go-ethereum's buckets.
PEERS_A_NETWORK = 2


def spread(nodes: Iterable[P], count: int) -> list[P]:
    """The first `count` of the nodes, in their order: of each network two, and more only where others do not suffice.

    Nodes without a public network, as in a LAN, are all different.
    """
    taken: Counter[str] = Counter()
    chosen: list[tuple[int, P]] = []
    surplus: list[tuple[int, P]] = []
    for place, node in enumerate(nodes):
        if node.network:
            taken[node.network] += 1
        if taken[node.network] <= PEERS_A_NETWORK:
            chosen.append((place, node))
            if len(chosen) == count:
                return [node for _, node in chosen]
        else:
            surplus.append((place, node))
    return [node for _, node in sorted([*chosen, *surplus[: count - len(chosen)]], key=lambda entry: entry[0])]

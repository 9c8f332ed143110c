"""Keeps the peers of one network from filling a peer's table, because keys cost nothing and addresses do.

An attacker can make 10,000 keys in half a second, and one of them is nearer to a key than all of a thousand honest
peers. So wherever peers are counted, at most two of one public network (IPv4 /24, IPv6 /48) count, as long as there are
others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Placed(Protocol):
    """A peer in a public network; "" if it is in none."""

    network: str


P = TypeVar("P", bound=Placed)

# The same limit as in the buckets of libp2p and go-ethereum.
PEERS_A_NETWORK = 2


def spread(nodes: Iterable[P], count: int) -> list[P]:
    """The first `count` of the nodes in their order: two of each network, and more only if there are not enough others.

    Nodes without a public network, as in a LAN, all count as different networks.
    """
    taken: Counter[str] = Counter()
    chosen: list[tuple[int, P]] = []
    surplus: list[tuple[int, P]] = []
    for index, node in enumerate(nodes):
        if node.network:
            taken[node.network] += 1
        if taken[node.network] <= PEERS_A_NETWORK:
            chosen.append((index, node))
            if len(chosen) == count:
                return [node for _, node in chosen]
        else:
            surplus.append((index, node))
    return [node for _, node in sorted([*chosen, *surplus[: count - len(chosen)]], key=lambda entry: entry[0])]

"""Remembers peers that left the routing table because they did not answer, to find them again after a partition.

When a swarm is split, each half forgets the other within minutes, and no table shows it. So some peers are remembered
longer than the table needs them.
"""

from __future__ import annotations

from collections import OrderedDict
from random import Random

from peerd.routing.dht.table import Contact, PeerNode

MAX_LOST = 256


class LostContacts:
    """The last peers that were lost, oldest first."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[bytes, PeerNode] = OrderedDict()

    def __repr__(self) -> str:
        return f"<LostContacts {len(self._nodes)}>"

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._nodes

    @property
    def contacts(self) -> list[Contact]:
        """The lost peers, the last one first."""
        return [node.contact for node in reversed(self._nodes.values())]

    def add(self, node: PeerNode) -> None:
        """Remember a peer; if there is no room, the oldest is forgotten."""
        self._nodes.pop(node.id, None)
        self._nodes[node.id] = node
        if len(self._nodes) > MAX_LOST:
            self._nodes.popitem(last=False)

    def sample(self, random: Random, count: int) -> list[PeerNode]:
        """Some lost peers, chosen at random."""
        nodes = list(self._nodes.values())
        return random.sample(nodes, min(count, len(nodes)))

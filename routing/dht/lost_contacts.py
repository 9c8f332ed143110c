"""Peers that left the routing table because they did not answer: the way back after a partition.

When a swarm is parted, each half forgets the other within minutes. Nobody's table shows that: only those who are
remembered longer than they are useful can.
"""

from __future__ import annotations

from collections import OrderedDict
from random import Random

from peerd.routing.dht.table import Contact, PeerNode

MAX_LOST = 256


class LostContacts:
    """The last of them, oldest first."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[bytes, PeerNode] = OrderedDict()

    def __repr__(self) -> str:
        return f"<LostContacts {len(self._nodes)}>"

    @property
    def contacts(self) -> list[Contact]:
        """The lost, those lost last first."""
        return [node.contact for node in reversed(self._nodes.values())]

    def add(self, node: PeerNode) -> None:
        """Remember one; the oldest makes room."""
        self._nodes.pop(node.id, None)
        self._nodes[node.id] = node
        if len(self._nodes) > MAX_LOST:
            self._nodes.popitem(last=False)

    def sample(self, random: Random, count: int) -> list[PeerNode]:
        """Some of them, at random."""
        nodes = list(self._nodes.values())
        return random.sample(nodes, min(count, len(nodes)))

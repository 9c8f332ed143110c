"""Who holds what we announce, so that renewing it every 20 s need not look its holders up each time.

Knows peers, distances and the time it is given; sends nothing. The difficulty is that those who should hold a key
change under us: newcomers may stand nearer, and some of the old ones leave. So only who *answered* is remembered,
anybody nearer that we hear of is asked as well, and after a while, or many losses, it is all looked up anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kademlia.node import Node

from peerd.routing.dht.table import PeerNode

# A lookup costs as much as three renewals. Newcomers are heard of within a renewal or two without one.
LOOKUP_S = 600.0
# Of those that the last lookup found, so many must be left.
LEAST_SHARE = 0.75
# A peer announces 8 spans of 16 shards at most, under each key or its part, and its addresses.
MAX_KEYS = 512


@dataclass(slots=True)
class _Key:
    nodes: list[PeerNode]
    # How many the lookup found, and when.
    found: int
    looked_up: float


class Holders:
    """For each key the peers that took what we last put there. `now` counts seconds steadily, from any start."""

    def __init__(self, count: int, now: Callable[[], float]) -> None:
        self._count = count
        self._now = now
        self._keys: dict[bytes, _Key] = {}

    def of(self, key: bytes) -> list[PeerNode]:
        """Whom to put it to again, nearest first; nobody where a lookup is due."""
        known = self._keys.get(key)
        if known is None or self._now() >= known.looked_up + LOOKUP_S or len(known.nodes) < LEAST_SHARE * known.found:
            return []
        return list(known.nodes)

    def looked_up(self, key: bytes, answered: Iterable[PeerNode]) -> None:
        """These took it, of those that a lookup found."""
        nodes = self._nearest(key, answered)
        self._keys.pop(key, None)
        self._keys[key] = _Key(nodes, len(nodes), self._now())
        if len(self._keys) > MAX_KEYS:
            del self._keys[next(iter(self._keys))]

    def renewed(self, key: bytes, answered: Iterable[PeerNode]) -> None:
        """These took it, of those that `of` named and newcomers."""
        self._keys[key].nodes = self._nearest(key, answered)

    def newcomers(self, key: bytes, nodes: Iterable[PeerNode]) -> list[PeerNode]:
        """Of `nodes` those that should hold the key and were not put it yet."""
        held = {node.id for node in self._keys[key].nodes}
        return [node for node in self._nearest(key, [*self._keys[key].nodes, *nodes]) if node.id not in held]

    def _nearest(self, key: bytes, nodes: Iterable[PeerNode]) -> list[PeerNode]:
        unique = {node.id: node for node in nodes}
        return sorted(unique.values(), key=Node(key).distance_to)[: self._count]

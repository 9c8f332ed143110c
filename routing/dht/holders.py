"""Remembers which peers hold what we announce, so that a renewal every 20 s need not look them up each time.

The peers that should hold a key change: newcomers may be nearer, and old holders leave. So only peers that
*answered* are remembered, nearer peers that we hear of are asked as well, and after a while, or after many losses,
the holders are looked up anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kademlia.node import Node

from peerd.routing.dht.diversity import spread
from peerd.routing.dht.table import PeerNode

# A lookup costs as much as three renewals. Without one, newcomers become known within a renewal or two.
LOOKUP_S = 600.0
# If less than this share of the holders that the last lookup found remains, look them up again.
LEAST_SHARE = 0.75
# A peer announces at most 8 spans with 16 shards each, under each key or its part, and its addresses.
MAX_KEYS = 512


@dataclass(slots=True)
class _Key:
    nodes: list[PeerNode]
    # How many holders the lookup found, and when.
    found: int
    looked_up: float


class Holders:
    """For each key the peers that accepted what we last put there. `now` counts seconds steadily, from any start."""

    def __init__(self, count: int, now: Callable[[], float]) -> None:
        self._count = count
        self._now = now
        self._keys: dict[bytes, _Key] = {}

    def of(self, key: bytes) -> list[PeerNode]:
        """The peers at which to renew, nearest first; empty when a fresh lookup is due."""
        known = self._keys.get(key)
        if known is None or self._now() >= known.looked_up + LOOKUP_S or len(known.nodes) < LEAST_SHARE * known.found:
            return []
        return list(known.nodes)

    def looked_up(self, key: bytes, answered: Iterable[PeerNode]) -> None:
        """Note the peers that accepted the records after a lookup."""
        nodes = self._nearest(key, answered)
        self._keys.pop(key, None)
        self._keys[key] = _Key(nodes, len(nodes), self._now())
        if len(self._keys) > MAX_KEYS:
            del self._keys[next(iter(self._keys))]

    def renewed(self, key: bytes, answered: Iterable[PeerNode]) -> None:
        """Note the peers that accepted the records in a renewal, from `of` and from newcomers."""
        self._keys[key].nodes = self._nearest(key, answered)

    def newcomers(self, key: bytes, nodes: Iterable[PeerNode]) -> list[PeerNode]:
        """Those of `nodes` that should hold the key and did not get the records yet."""
        held = {node.id for node in self._keys[key].nodes}
        return [node for node in self._nearest(key, [*self._keys[key].nodes, *nodes]) if node.id not in held]

    def _nearest(self, key: bytes, nodes: Iterable[PeerNode]) -> list[PeerNode]:
        unique = {node.id: node for node in nodes}
        return spread(sorted(unique.values(), key=Node(key).distance_to), self._count)

"""Finds chains for sessions: joins what the DHT says with how peers have treated us.

Knows the directory, the planner and the links' memory; opens nothing. A peer that fails leaves the
routes of every session of this process in that instant, whatever its announcements say.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chain import Chain, plan_chain
from peerd.routing.directory import Directory
from peerd.routing.links import Links


class SwarmFinder:
    """Chains over one model's blocks, from the directory's latest view."""

    def __init__(self, directory: Directory, links: Links, model: bytes, block_count: int, rng: random.Random) -> None:
        self._directory = directory
        self._links = links
        self._model = model
        self._block_count = block_count
        self._rng = rng
        self._stale = False

    async def find(self, blocks: Span, *, tokens: int, exclude: Collection[PeerId]) -> Chain:
        """The best chain over `blocks`. Raises NoChain, naming the blocks that nobody serves."""
        offers = await self._directory.servers(self._model, self._block_count)
        avoid = self._links.avoided() | frozenset(exclude)
        return plan_chain(offers, blocks, tokens=tokens, avoid=avoid, rtts_s=self._links.rtts_s(), rng=self._rng)

    def failed(self, peer: PeerId) -> None:
        """Leave the peer out for a while, and look again who else there is."""
        self._links.failed(peer)

    def succeeded(self, peer: PeerId) -> None:
        self._links.succeeded(peer)

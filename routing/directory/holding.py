"""One span that a peer holds or is about to hold: the unit that placement is planned with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ServerRecord


@dataclass(frozen=True, slots=True)
class Holding:
    """A peer's announcement of one span, without the ways to the peer."""

    peer_id: PeerId
    record: ServerRecord


class HoldingSource(Protocol):
    """Who knows all of a swarm: the directory."""

    async def holdings(self, model: bytes, block_count: int) -> list[Holding]:
        """Who holds which span of a model (digest) now, or is about to. Raises PartialView."""

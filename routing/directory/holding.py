"""One span that a peer hosts or is about to host: the unit in which placement is planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ServerRecord


@dataclass(frozen=True, slots=True)
class Holding:
    """A peer's announcement of one span, without the peer's addresses."""

    peer_id: PeerId
    record: ServerRecord


class HoldingSource(Protocol):
    """Gives the holdings of a whole swarm: the directory."""

    async def holdings(self, model: bytes, block_count: int) -> list[Holding]:
        """Which peer holds which span of a model (a digest) now, or is about to. Raises PartialView."""

"""What this peer announces: its spans, where others reach it, and the models that it knows by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peerd.protocol.records.bodies import MAX_ADDRESSES, MAX_RELAYS
from peerd.protocol.records.envelope import Announcement, ModelRecord, PeerRecord, ServerRecord
from peerd.routing.reach.verdict import Whereabouts

Spans = Callable[[], Sequence[ServerRecord]]
Models = Callable[[], Sequence[ModelRecord]]


class OwnRecords:
    """The bodies of our next announcements. `spans` and `models` are asked each time."""

    def __init__(self) -> None:
        self.where = Whereabouts()
        self.spans: Spans = tuple
        self.models: Models = tuple

    def now(self) -> list[Announcement]:
        """What to announce now; nothing while we serve nothing, for then nobody needs to find us."""
        spans = self.spans()
        if not spans:
            return []
        addresses = tuple(str(address.with_peer(None)) for address in self.where.addresses[:MAX_ADDRESSES])
        relays = tuple(str(relay) for relay in self.where.relays[:MAX_RELAYS])
        peer = PeerRecord(seq=0, expires=0.0, addresses=addresses, relays=relays).fitted()
        return [*spans, peer, *self.models()]

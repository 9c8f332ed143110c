"""What a peer that serves announces: its spans, and what the models are called whose blocks it serves.

The slots know the spans. What others measure is filled in here: the delays to the peers that may follow on a span, and
how fast our line takes what we send. Discovery asks for all of it whenever it announces.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from peerd.discovery.discovery import Discovery
from peerd.discovery.prober import RttProber
from peerd.net.connections import Connections
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ModelRecord, ServerRecord
from peerd.routing.chains.rules import ChainRules
from peerd.spans.catalogue import ModelNames
from peerd.spans.neighbours import Neighbours
from peerd.spans.slots import Slots


class Announcements:
    """What one peer announces; `rules` say whose distance is worth announcing."""

    def __init__(
        self, own: PeerId, connections: Connections, discovery: Discovery, slots: Slots, rules: ChainRules
    ) -> None:
        random = Random(os.urandom(16))
        prober = RttProber(connections, discovery.track_record, discovery.may_dial)
        self._connections = connections
        self._slots = slots
        self._neighbours = Neighbours(
            own, discovery.directory, discovery.track_record, prober, random, rules, slots.records
        )
        self._names = ModelNames(discovery.dht, own, discovery.announce_soon, random)

    def __repr__(self) -> str:
        return f"<Announcements of {len(self._slots)} slots, {self._names!r}>"

    def spans(self) -> Sequence[ServerRecord]:
        """The spans that are served or on their way; `seq` and `expires` are the announcer's."""
        uplink = self._connections.uplink
        filled = self._neighbours.filled(self._slots.records())
        return [replace(record, uplink=record.uplink or uplink) for record in filled]

    def models(self) -> Sequence[ModelRecord]:
        """The models that we are to name."""
        return self._names.records()

    def add_model(self, words: ModelRecord) -> None:
        """Blocks of this model are served from now on."""
        self._neighbours.serves(words.model, words.block_count)
        self._names.add(words)

    async def measure(self) -> None:
        """Measure the delays, until cancelled. Run it once there is a model."""
        await self._neighbours.run()

    async def keep_names(self) -> None:
        """Name only the models that others leave to us, until cancelled. Run it once there is a model."""
        await self._names.run()

"""What a peer serves, slot by slot, and what others are told of it.

A place is one slot of our announcements (spec/records.md): the span in it, or the one that is on its way there.
Knows records; serves, loads and decides nothing. The difficulty is a span that moves: who plans must hear of the new
place before the old one is given up, and a slot holds one span at a time. So the intention lies in a spare slot
as long as the old span is served, or the new one may still be another, and in the slot itself from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from peerd.protocol.errors import InvalidRequest
from peerd.protocol.records.bodies import MAX_NAMES, MAX_PAYLOAD_BYTES, MAX_SLOTS, ServerState, intention_slot
from peerd.protocol.records.envelope import ServerRecord
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.server.served_spans import ServedSpan
    from peerd.server.server import Server
    from peerd.spans.loading import LoadedSpan, SpanLoader

# What the times that are filled in later add to a record.
_TIMES_BYTES = 16


class Place:
    """One slot. `served` and `loaded` are None while it is empty; `intended` is the span that is coming, if one is."""

    def __init__(self, slot: int, expected: ServerRecord, loader: SpanLoader | None = None) -> None:
        self.slot = slot
        self.served: ServedSpan | None = None
        self.loaded: LoadedSpan | None = None
        #: What loads other spans here; None where the span was named by the operator.
        self.loader = loader
        self.intended: Span | None = None
        # Whether the intended span is on its way for good; before that it lies in the spare slot.
        self._decided = False
        self._last = expected

    def decide(self, span: Span) -> None:
        """This span is on its way, and nothing else is here."""
        self.intended, self._decided = span, True

    def record(self, state: ServerState) -> ServerRecord:
        """What we say of the span here; `seq` and `expires` are the announcer's."""
        assert self.served is not None
        assert self.loaded is not None
        self._last = self._record(self.served, self.loaded, state)
        return self._last

    def _record(self, served: ServedSpan, loaded: LoadedSpan, state: ServerState) -> ServerRecord:
        return ServerRecord(
            seq=0,
            expires=0.0,
            model=served.model,
            span=served.span,
            state=state,
            dtype=loaded.dtype,
            quantization=loaded.quantization,
            codecs=loaded.codecs,
            throughput=loaded.throughput,
            # What is free beside a queue is not for whoever comes now.
            free_tokens=0 if served.task.admission.is_full else served.task.engine.free_length,
            max_length=served.max_length,
            block_roots=loaded.roots,
            adapters=tuple(sorted(served.task.adapters)),
            client_adapters=served.adapter_room.session_bytes,
            slot=self.slot,
            queue_s=self._queue_s(served, loaded),
            uplink=loaded.uplink,
        )

    def _queue_s(self, served: ServedSpan, loaded: LoadedSpan) -> float:
        alone_s = len(served.span) / max(loaded.throughput, 1.0)
        # A millisecond more or less is chance.
        return round(served.task.busy.queue_s(alone_s, trio.current_time()), 3)

    def intention(self) -> ServerRecord | None:
        """What we say of the span that is coming: beside the one that is here, or while that may still change, in the
        spare slot.
        """
        if self.intended is None:
            return None
        slot = self.slot if self._decided and self.served is None else intention_slot(self.slot)
        return replace(
            self._last,
            span=self.intended,
            state="joining",
            free_tokens=0,
            block_roots=(),
            adapters=(),
            queue_s=0.0,
            slot=slot,
        )

    def vacate(self) -> None:
        """Nothing is served here for now; what is intended comes for good."""
        self.served = self.loaded = None
        self._decided = True

    def fill(self, served: ServedSpan, loaded: LoadedSpan) -> None:
        """A span has come. Raises InvalidRequest, having changed nothing, if its announcement would be too long."""
        check_record(self._record(served, loaded, "online"))
        self.served, self.loaded, self.intended, self._decided = served, loaded, None, False

    def check(self) -> None:
        """Raise InvalidRequest if what is here now cannot be announced."""
        check_record(self.record("online"))


class Places:
    """All slots of one peer."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._places: dict[int, Place] = {}

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places.values())

    def __len__(self) -> int:
        return len(self._places)

    def reserve(self, expected: ServerRecord) -> Place:
        """A slot for a span that is yet to be chosen or loaded; `expected` is as much of its announcement as is known.

        Raises InvalidRequest where all slots are taken.
        """
        slot = next((slot for slot in range(MAX_SLOTS) if slot not in self._places), None)
        if slot is None:
            raise InvalidRequest(f"a peer announces at most {MAX_SLOTS} spans")
        self._places[slot] = Place(slot, expected)
        return self._places[slot]

    def release(self, place: Place) -> None:
        """Nothing will come of it."""
        del self._places[place.slot]

    def add(self, place: Place, served: ServedSpan, loaded: LoadedSpan) -> None:
        """A first span has come: serve it from now on. Raises InvalidRequest if it cannot be announced."""
        place.fill(served, loaded)
        self._server.serve(served)

    def of(self, served: ServedSpan) -> Place:
        """The place of a span. Raises InvalidRequest if it is served no more."""
        for place in self:
            if place.served is served:
                return place
        raise InvalidRequest(f"blocks {served.span} are not served here any more")

    def records(self) -> list[ServerRecord]:
        """What we announce now."""
        found = []
        for place in self:
            if place.served is not None:
                found.append(place.record("draining" if self._server.is_leaving(place.served) else "online"))
            intention = place.intention()
            if intention is not None and not self._server.draining:
                found.append(intention)
        return found


def check_record(record: ServerRecord) -> None:
    """Raise InvalidRequest if its adapters are more than one announcement holds."""
    spare = MAX_PAYLOAD_BYTES - len(record.fitted().to_payload()) - _TIMES_BYTES
    if len(record.adapters) > MAX_NAMES or (record.adapters and spare < 0):
        raise InvalidRequest(
            f"{len(record.adapters)} adapters do not fit the announcement of blocks {record.span}: serve at most"
            f" {MAX_NAMES} of them, with shorter names"
        )

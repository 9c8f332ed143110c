"""What a peer serves, slot by slot, and what others are told of it.

A place is one slot of our announcements (spec/records.md): the span in it, or the one that is on its way there.
Knows records; serves, loads and decides nothing. The difficulty is a span that moves: who plans must hear of the new
place before the old one is given up, and a slot holds one span at a time. So the intention lies in a spare slot
as long as the old span is served, and in the slot itself from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from peerd.protocol.announcements import MAX_NAMES, MAX_PAYLOAD_BYTES, MAX_SLOTS, ServerState, intention_slot
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.records import ServerRecord
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.server import ServedSpan, Server
    from peerd.serving import LoadedSpan
    from peerd.span_loader import SpanLoader

# What the times that are filled in later add to a record.
_TIMES_BYTES = 16


class Place:
    """One slot. `served` and `loaded` are None while it is empty; `intended` is the span that is coming, if one is."""

    def __init__(self, slot: int, served: ServedSpan, loaded: LoadedSpan, loader: SpanLoader | None) -> None:
        self.slot = slot
        self.served: ServedSpan | None = served
        self.loaded: LoadedSpan | None = loaded
        #: What loads other spans here; None where the span was named by the operator.
        self.loader = loader
        self.intended: Span | None = None
        self._last = self.record("online")

    def record(self, state: ServerState) -> ServerRecord:
        """What we say of the span here; `seq` and `expires` are the announcer's."""
        assert self.served is not None
        assert self.loaded is not None
        served, loaded = self.served, self.loaded
        self._last = ServerRecord(
            seq=0,
            expires=0.0,
            model=served.model,
            span=served.span,
            state=state,
            dtype=loaded.dtype,
            quantization=loaded.quantization,
            codecs=loaded.codecs,
            throughput=loaded.throughput,
            free_tokens=served.task.engine.free_length,
            max_length=served.max_length,
            block_roots=loaded.roots,
            adapters=tuple(sorted(served.task.adapters)),
            client_adapters=served.adapter_room.session_bytes,
            slot=self.slot,
            queue_s=self._queue_s(served, loaded),
            uplink=loaded.uplink,
        )
        return self._last

    def _queue_s(self, served: ServedSpan, loaded: LoadedSpan) -> float:
        alone_s = len(served.span) / max(loaded.throughput, 1.0)
        # A millisecond more or less is chance.
        return round(served.task.busy.queue_s(alone_s, trio.current_time()), 3)

    def intention(self, slot: int) -> ServerRecord | None:
        """What we say of the span that is coming, as if it were in this slot."""
        if self.intended is None:
            return None
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
        """Nothing is served here for now."""
        self.served = self.loaded = None

    def fill(self, served: ServedSpan, loaded: LoadedSpan) -> None:
        """A span has come. Raises InvalidRequest, having changed nothing, if its announcement would be too long."""
        check_record(Place(self.slot, served, loaded, None).record("online"))
        self.served, self.loaded, self.intended = served, loaded, None

    def check(self) -> None:
        """Raise InvalidRequest if what is here now cannot be announced."""
        check_record(self.record("online"))


class Places:
    """All slots of one peer."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._places: list[Place] = []

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, served: ServedSpan, loaded: LoadedSpan, loader: SpanLoader | None = None) -> Place:
        """Give a span the next slot, and serve it from now on. Raises InvalidRequest if it cannot be announced."""
        if len(self._places) == MAX_SLOTS:
            raise InvalidRequest(f"a peer announces at most {MAX_SLOTS} spans")
        place = Place(len(self._places), served, loaded, loader)
        place.check()
        self._server.serve(served)
        self._places.append(place)
        return place

    def of(self, served: ServedSpan) -> Place:
        """The place of a span. Raises InvalidRequest if it is served no more."""
        for place in self._places:
            if place.served is served:
                return place
        raise InvalidRequest(f"blocks {served.span} are not served here any more")

    def records(self) -> list[ServerRecord]:
        """What we announce now."""
        found = []
        for place in self._places:
            if place.served is not None:
                found.append(place.record("draining" if self._server.is_leaving(place.served) else "online"))
                # Where that slot is taken the intention is announced only once the old place is given up.
                spare = intention_slot(place.slot)
                intention = place.intention(spare) if spare >= len(self._places) else None
            else:
                intention = place.intention(place.slot)
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

"""What a peer serves, slot by slot, and the records that announce it.

A slot holds the span that is served under one number of our announcements (spec/discovery/records.md), or the span that
is coming there. When a span moves, other peers that plan must hear of the new blocks before the old ones are given up,
but a slot announces one span at a time. So an intention is announced in a spare slot while the old span is still served
or the goal may still change, and in the slot itself afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

# The size that the RTTs, filled in later, add to a record.
_TIMES_BYTES = 16


class Slot:
    """One slot, known to other peers by its `number`.

    `served` and `loaded` are None while it is empty; `intended` is the span that is coming, if any.
    """

    def __init__(self, number: int, expected: ServerRecord, changed: Callable[[], None]) -> None:
        self.number = number
        self.served: ServedSpan | None = None
        self.loaded: LoadedSpan | None = None
        #: Loads other spans into this slot; None if the operator named the span.
        self.loader: SpanLoader | None = None
        self.intended: Span | None = None
        # Whether the intended span is final. Before that it is announced in the spare slot.
        self._decided = False
        self._last = expected
        self._changed = changed
        # Set, and replaced, when another span is served here or a device fails.
        self._news = trio.Event()

    def decide(self, span: Span) -> None:
        """Make this the final span of an empty slot."""
        self.intended, self._decided = span, True

    def record(self, state: ServerState, lent_tokens: int = 0) -> ServerRecord:
        """The record of the span here; the announcer fills in `seq` and `expires`. `lent_tokens` are free for those who
        wait for them.
        """
        assert self.served is not None
        assert self.loaded is not None
        self._last = self._record(self.served, self.loaded, state, lent_tokens)
        return self._last

    def _record(self, served: ServedSpan, loaded: LoadedSpan, state: ServerState, lent_tokens: int = 0) -> ServerRecord:
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
            # While sessions queue, newcomers cannot have the free tokens: announce 0.
            free_tokens=0 if served.task.admission.is_full else served.task.engine.free_length + lent_tokens,
            max_length=served.max_length,
            block_roots=loaded.roots,
            adapters=tuple(sorted(served.task.adapters)),
            client_adapters=served.adapter_room.session_bytes,
            slot=self.number,
            queue_s=self._queue_s(served, loaded),
            uplink=loaded.uplink,
            head=served.head is not None,
        )

    def _queue_s(self, served: ServedSpan, loaded: LoadedSpan) -> float:
        alone_s = len(served.span) / max(loaded.throughput, 1.0)
        # Differences below a millisecond are noise.
        return round(served.task.busy.queue_s(alone_s, trio.current_time()), 3)

    def intention(self) -> ServerRecord | None:
        """The record of the span that is coming, or None.

        It is in the spare slot while another span is served here or the intended one may still change.
        """
        if self.intended is None:
            return None
        slot = self.number if self._decided and self.served is None else intention_slot(self.number)
        return replace(
            self._last,
            span=self.intended,
            state="joining",
            free_tokens=0,
            block_roots=(),
            adapters=(),
            queue_s=0.0,
            head=False,
            slot=slot,
        )

    def vacate(self) -> None:
        """Empty the slot. The intended span is final now."""
        self.served = self.loaded = None
        self._decided = True

    def fill(self, served: ServedSpan, loaded: LoadedSpan) -> None:
        """Put a loaded span here. Raises InvalidRequest, and changes nothing, if its announcement would be too long."""
        check_record(self._record(served, loaded, "online"))
        self.served, self.loaded, self.intended, self._decided = served, loaded, None, False
        served.task.admission.on_change.append(self._changed)
        served.task.on_broken.append(self._wake)
        self._wake()

    @property
    def is_broken(self) -> bool:
        """Whether the device under what is served here computes no more."""
        return self.served is not None and bool(self.served.task.health.broken)

    async def wait_broken(self) -> None:
        """Wait until the device under a span that is served here fails."""
        while not self.is_broken:
            await self._news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def check(self) -> None:
        """Raise InvalidRequest if the span here cannot be announced."""
        check_record(self.record("online"))


class Slots:
    """All slots of one peer. `changed` is called when a span has become full, or is no longer full."""

    def __init__(self, server: Server, changed: Callable[[], None]) -> None:
        self._server = server
        self._changed = changed
        self._slots: dict[int, Slot] = {}

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def reserve(self, expected: ServerRecord) -> Slot:
        """Reserve a slot for a span that is still to be chosen or loaded; `expected` is what is known of its
        announcement.

        Raises InvalidRequest if all slots are taken.
        """
        number = next((number for number in range(MAX_SLOTS) if number not in self._slots), None)
        if number is None:
            raise InvalidRequest(f"a peer announces at most {MAX_SLOTS} spans")
        self._slots[number] = Slot(number, expected, self._changed)
        return self._slots[number]

    def release(self, slot: Slot) -> None:
        """Free a slot from which nothing will come."""
        del self._slots[slot.number]

    def add(self, slot: Slot, served: ServedSpan, loaded: LoadedSpan) -> None:
        """Serve a slot's first span from now on. Raises InvalidRequest if it cannot be announced."""
        slot.fill(served, loaded)
        self._server.serve(served)

    def of(self, served: ServedSpan) -> Slot:
        """The slot of a span. Raises InvalidRequest if the span is not served any more."""
        for slot in self:
            if slot.served is served:
                return slot
        raise InvalidRequest(f"blocks {served.span} are not served here any more")

    def records(self) -> list[ServerRecord]:
        """The records to announce now."""
        found = []
        for slot in self:
            if slot.served is not None:
                state: ServerState = "draining" if self._server.is_leaving(slot.served) else "online"
                found.append(slot.record(state, self._server.lent_tokens(slot.served)))
            intention = slot.intention()
            if intention is not None and not self._server.draining:
                found.append(intention)
        return found


def check_record(record: ServerRecord) -> None:
    """Raise InvalidRequest if the record has more adapters than fit into one announcement."""
    spare = MAX_PAYLOAD_BYTES - len(record.fitted().to_payload()) - _TIMES_BYTES
    if len(record.adapters) > MAX_NAMES or (record.adapters and spare < 0):
        raise InvalidRequest(
            f"{len(record.adapters)} adapters do not fit the announcement of blocks {record.span}: serve at most"
            f" {MAX_NAMES} of them, with shorter names"
        )

"""Keeps our announcements alive: signs them anew before they expire, and takes them back when we leave.

Knows what was announced under which keys and until when; knows neither what to announce, which it asks
for each time, nor how records are stored. The difficulty is that copies of what we signed stay valid
where we cannot reach them: whatever is withdrawn is withdrawn by a newer record that outlives it,
and no `seq` is ever used twice, restarts included (spec/records.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import trio

from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import (
    MAX_TTL_S,
    Announcement,
    ServerRecord,
    SignedRecord,
    keys_of,
    next_seq,
    sign_record,
)

log = logging.getLogger(__name__)

# A span whose peer crashes is gone within this. Everything is announced anew every third of it.
TTL_S = 60.0
# What else is announced outlives ten of these. More often it is only said where few could hold it: one that restarts
# has forgotten it, and in a small swarm that may be everybody.
OTHERS_PERIOD_S = 60.0
FEW_HOLDERS = 8
# After an announcement that reached nobody.
RETRY_S = 5.0
# A peer whose free KV changes by the step announces it at most this often.
MIN_PERIOD_S = 2.0


class RecordSink(Protocol):
    """Who stores records: the DHT."""

    async def put(self, *records: SignedRecord) -> int:
        """Returns how many peers hold them, of the record with the fewest."""


class SeqFile(Protocol):
    """Where the last `seq` outlives a restart."""

    def load(self) -> int:
        """The last saved `seq`; 0 if there is none."""

    async def save(self, seq: int) -> None:
        """Keep `seq`. A record that carries it is published only after this returned."""


class Announcer:
    """Announces for one identity. Run `run` while serving; call `leave` once after it was cancelled.

    current: what to announce now; `seq` and `expires` are filled in here. A peer's spans have slots.
    now: unix seconds, corrected.
    """

    def __init__(
        self,
        identity: Identity,
        sink: RecordSink,
        seq_file: SeqFile,
        current: Callable[[], Sequence[Announcement]],
        now: Callable[[], float],
    ) -> None:
        self._identity = identity
        self._sink = sink
        self._seq_file = seq_file
        self._seq = seq_file.load()
        self._current = current
        self._now = now
        self._changed = trio.Event()
        # Set when the next round has ended.
        self._announced = trio.Event()
        # The span announced in each slot, until it is withdrawn; and when the last record of the slot ends.
        self._servers: dict[int, ServerRecord] = {}
        self._slot_ends: dict[int, float] = {}
        # Everything else that was announced, and when it is due again.
        self._others: dict[Announcement, float] = {}

    def changed(self) -> None:
        """Announce soon: what `current` returns has changed."""
        self._changed.set()

    async def announced(self) -> None:
        """Wait until what `current` returns now was announced, or nobody took it."""
        await self._announced.wait()

    async def run(self) -> None:
        """Announce every third of the records' lifetime, and soon after each change. Runs until cancelled."""
        while True:
            started = trio.current_time()
            self._changed = trio.Event()
            announced, self._announced = self._announced, trio.Event()
            delivered = await self.announce()
            announced.set()
            if not delivered:
                log.warning("nobody took some announcement of ours; trying again in %g s", RETRY_S)
            period_s = TTL_S / 3 if delivered else RETRY_S
            with trio.move_on_at(started + period_s):
                await self._changed.wait()
            # What is said for the first time does not wait for a round that said nothing.
            if self._servers:
                await trio.sleep_until(started + MIN_PERIOD_S)

    async def announce(self) -> bool:
        """Sign and store what is to be announced now. Returns whether somebody took each record."""
        bodies = self._current()
        spans = {body.slot: body for body in bodies if isinstance(body, ServerRecord)}
        leaving = [old for slot, old in self._servers.items() if self._leaves_keys(old, spans.get(slot))]
        # Before the new records: of a slot whose span moved, the newest record must be the new span's.
        await self._withdraw([old for old in leaving if old.slot in spans])
        due = [body for body in bodies if self._is_due(body)]
        holders = await self._publish([self._timed(body) for body in due]) if due else 0
        self._note_others(due, holders)
        # After them: an intention must not be gone before what came of it is there.
        await self._withdraw([old for old in leaving if old.slot not in spans])
        return not due or holders > 0

    async def leave(self) -> None:
        """Announce every span as `offline`. The caller bounds the time, and shields it from its own end."""
        await self._withdraw(list(self._servers.values()))

    def _is_due(self, body: Announcement) -> bool:
        return isinstance(body, ServerRecord) or self._now() >= self._others.get(body, 0.0)

    def _note_others(self, announced: Sequence[Announcement], holders: int) -> None:
        now = self._now()
        # A moment less, or a round that begins early would leave it to the next.
        due_s = now + OTHERS_PERIOD_S - TTL_S / 6 if holders >= FEW_HOLDERS else now
        self._others = {body: when for body, when in self._others.items() if when > now}
        self._others |= {body: due_s for body in announced if not isinstance(body, ServerRecord)}

    def _timed(self, body: Announcement) -> Announcement:
        # Only spans disappear with their peer; where it was, and what a model is called, hurts nobody.
        ttl_s = TTL_S if isinstance(body, ServerRecord) else MAX_TTL_S
        return replace(body, expires=self._now() + ttl_s)

    def _leaves_keys(self, old: ServerRecord, new: ServerRecord | None) -> bool:
        """Whether copies of the old record lie under keys where no copy of the new one will."""
        peer_id = self._identity.peer_id
        return new is None or not set(keys_of(old, peer_id)) <= set(keys_of(new, peer_id))

    async def _withdraw(self, servers: Sequence[ServerRecord]) -> None:
        now = self._now()
        offline = []
        for server in servers:
            ends = max(self._slot_ends[server.slot], now + TTL_S)
            # Beyond that our clock was wrong when we signed, and nobody takes the record anyway.
            if ends <= now + MAX_TTL_S:
                offline.append(server.offline(seq=server.seq + 1, expires=ends))
        if offline:
            await self._publish(offline)
        # Only now: who is cancelled in between withdraws again on leaving.
        for server in servers:
            del self._servers[server.slot]

    async def _publish(self, bodies: Sequence[Announcement]) -> int:
        """Sign with the next `seq` each and store."""
        numbered = []
        for body in bodies:
            self._seq = next_seq(self._now(), self._seq)
            numbered.append(replace(body, seq=self._seq))
        await self._seq_file.save(self._seq)
        for body in numbered:
            if isinstance(body, ServerRecord):
                self._slot_ends[body.slot] = max(body.expires, self._slot_ends.get(body.slot, 0.0))
                if body.state != "offline":
                    self._servers[body.slot] = body
        return await self._sink.put(*(self._sign(body) for body in numbered))

    def _sign(self, body: Announcement) -> SignedRecord:
        return sign_record(self._identity, body.fitted() if isinstance(body, ServerRecord) else body)

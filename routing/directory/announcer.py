"""Keeps our announcements alive: signs them anew before they expire, and withdraws them when we leave.

Copies of a signed record stay valid on peers that we cannot reach. So a record is withdrawn by a newer one that expires
no sooner, and no `seq` is used twice, also after a restart (spec/discovery/records.md). What to announce comes from
`current`, each time anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import trio

from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import MAX_TTL_S, Announcement, ServerRecord, SignedRecord, next_seq, sign_record
from peerd.protocol.records.keys import keys_of
from peerd.protocol.span import Span

log = logging.getLogger(__name__)

# A span whose peer crashes disappears within this time. Spans are announced anew every third of it.
TTL_S = 60.0
# Other records outlive ten of these periods. They are announced with every round only if few peers hold them: a holder
# that restarts has forgotten them, and in a small swarm that may be every holder.
OTHERS_PERIOD_S = 60.0
FEW_HOLDERS = 8
# Pause after an announcement that reached no peer.
RETRY_S = 5.0
# A peer whose free KV changes with every step announces it at most this often; a span's new state goes out at once.
MIN_PERIOD_S = 2.0


class RecordSink(Protocol):
    """Stores records: the DHT."""

    async def put(self, *records: SignedRecord) -> int:
        """Store the records. Returns how many peers hold the record that fewest peers hold."""


class SeqFile(Protocol):
    """Keeps the last `seq` over a restart."""

    def load(self) -> int:
        """The last saved `seq`; 0 if there is none."""

    async def save(self, seq: int) -> None:
        """Save `seq`. A record that carries it is published only after this has returned."""


class Announcer:
    """Announces for one identity. Run `run` while serving; call `leave` once after `run` was cancelled.

    current: returns the bodies to announce now, without `seq` and `expires`. Spans have slots.
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
        # The span announced in each slot, until it is withdrawn; and when the last record of each slot expires.
        self._servers: dict[int, ServerRecord] = {}
        self._slot_ends: dict[int, float] = {}
        # Every other announced body, and when it is due again.
        self._others: dict[Announcement, float] = {}

    def announce_soon(self) -> None:
        """Announce soon: the result of `current` has changed."""
        self._changed.set()

    async def wait_announced(self) -> None:
        """Wait until the present result of `current` was announced, or the attempt failed."""
        await self._announced.wait()

    async def run(self) -> None:
        """Announce every third of the records' lifetime, and soon after each change. Runs until cancelled."""
        while True:
            started = trio.current_time()
            self._changed = trio.Event()
            announced, self._announced = self._announced, trio.Event()
            try:
                delivered = await self.announce()
            finally:
                announced.set()
            if not delivered:
                log.warning("no peer stored some of our announcements; trying again in %g s", RETRY_S)
            period_s = TTL_S / 3 if delivered else RETRY_S
            with trio.move_on_at(started + period_s):
                await self._changed.wait()
            if self._servers:
                await self._wait_for_news(started + MIN_PERIOD_S)

    async def _wait_for_news(self, until: float) -> None:
        """Wait until then, for figures change with every step; or until a span has come, gone, moved or changed its
        state, for others may be waiting for that.
        """
        with trio.move_on_at(until):
            while not self._has_news():
                self._changed = trio.Event()
                await self._changed.wait()

    def _has_news(self) -> bool:
        spans = [body for body in self._current() if isinstance(body, ServerRecord) and body.state != "offline"]
        return _states(spans) != _states(self._servers.values())

    async def announce(self) -> bool:
        """Sign and store what is due now. Returns whether every record was stored by at least one peer."""
        bodies = self._current()
        spans = {body.slot: body for body in bodies if isinstance(body, ServerRecord)}
        leaving = [old for slot, old in self._servers.items() if self._leaves_keys(old, spans.get(slot))]
        # Before the new records: in a slot whose span moved, the newest record must be the new span's.
        await self._withdraw([old for old in leaving if old.slot in spans])
        due = [body for body in bodies if self._is_due(body)]
        holders = await self._publish([self._timed(body) for body in due]) if due else 0
        self._note_others(due, holders)
        # After the new records: an intention must not disappear before the span that it announced is there.
        await self._withdraw([old for old in leaving if old.slot not in spans])
        return not due or holders > 0

    async def leave(self) -> None:
        """Announce every span as `offline`. The caller bounds the time, and shields this call from cancellation."""
        await self._withdraw(list(self._servers.values()))

    def _is_due(self, body: Announcement) -> bool:
        return isinstance(body, ServerRecord) or self._now() >= self._others.get(body, 0.0)

    def _note_others(self, announced: Sequence[Announcement], holders: int) -> None:
        now = self._now()
        # A little less than the period, or a round that begins early would leave it to the next.
        due_s = now + OTHERS_PERIOD_S - TTL_S / 6 if holders >= FEW_HOLDERS else now
        self._others = {body: when for body, when in self._others.items() if when > now}
        self._others |= {body: due_s for body in announced if not isinstance(body, ServerRecord)}

    def _timed(self, body: Announcement) -> Announcement:
        # Only spans disappear with their peer; stale addresses and model names do no harm.
        ttl_s = TTL_S if isinstance(body, ServerRecord) else MAX_TTL_S
        return replace(body, expires=self._now() + ttl_s)

    def _leaves_keys(self, old: ServerRecord, new: ServerRecord | None) -> bool:
        """Whether copies of the old record lie under DHT keys that the new record will not overwrite."""
        peer_id = self._identity.peer_id
        return new is None or not set(keys_of(old, peer_id)) <= set(keys_of(new, peer_id))

    async def _withdraw(self, servers: Sequence[ServerRecord]) -> None:
        now = self._now()
        offline = []
        for server in servers:
            ends = max(self._slot_ends[server.slot], now + TTL_S)
            # A later expiry means that our clock was wrong when we signed; other peers refuse such a record anyway.
            if ends <= now + MAX_TTL_S:
                offline.append(server.offline(seq=server.seq + 1, expires=ends))
        if offline:
            await self._publish(offline)
        # Forget only after publishing: if we are cancelled before that, `leave` withdraws again.
        for server in servers:
            del self._servers[server.slot]

    async def _publish(self, bodies: Sequence[Announcement]) -> int:
        """Sign each body with the next `seq` and store the records. Returns how many peers hold them at least."""
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


def _states(servers: Iterable[ServerRecord]) -> dict[int, tuple[bytes, Span, str]]:
    """What of each span is worth an announcement of its own."""
    return {server.slot: (server.model, server.span, server.state) for server in servers}

"""The records that we keep for other peers: sets of them under DHT keys, with limits in every direction.

A write that is refused changes nothing, and a peer that fills a key or the store can only replace its own records
(spec/discovery/dht.md).

This is not kademlia's `IStorage`: its `store[key] = value` names no storer and cannot refuse.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

from peerd.protocol.addresses import public_network
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import PeerId
from peerd.protocol.records.bodies import MAX_SLOTS
from peerd.protocol.records.envelope import RecordSubject, SignedRecord, VerifiedRecord, open_record, replaces
from peerd.routing.dht.messages import MAX_RECORDS, Outcome

Name = TypeVar("Name", bound=str)

# How many expiry times of replaced records are tolerated, beyond as many as there are records.
_SPARE_ENDS = 1024


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Limits of the whole store, of each storer and each network, and of each key.

    A network is a /24 of public addresses (IPv6: a /48). A peer with 8 spans of 16 shards announces at most 128 KiB
    of records, up to 8 of them under one key, and as much again while it moves all of them at once.
    """

    total_bytes: int = 64 * 2**20
    storer_bytes: int = 256 * 2**10
    network_bytes: int = 2 * 2**20
    records_a_key: int = MAX_RECORDS
    storer_records_a_key: int = 2 * MAX_SLOTS
    network_records_a_key: int = MAX_RECORDS // 4


@dataclass(frozen=True, slots=True)
class _Entry:
    record: VerifiedRecord
    data: bytes
    # The storer and the network against whose shares the record counts.
    storer: PeerId
    network: str | None


@dataclass(slots=True)
class _Set:
    """The records under one key, and how many of them each storer and each network has."""

    entries: dict[RecordSubject, _Entry] = field(default_factory=dict)
    encoded: set[bytes] = field(default_factory=set)
    of_storer: Counter[PeerId] = field(default_factory=Counter)
    of_network: Counter[str] = field(default_factory=Counter)

    def add(self, entry: _Entry) -> None:
        self.entries[entry.record.slot] = entry
        self.encoded.add(entry.data)
        self._count(entry, 1)

    def remove(self, entry: _Entry) -> None:
        del self.entries[entry.record.slot]
        self.encoded.discard(entry.data)
        self._count(entry, -1)

    def _count(self, entry: _Entry, sign: int) -> None:
        _add_to(self.of_storer, entry.storer, sign)
        if entry.network is not None:
            _add_to(self.of_network, entry.network, sign)


_EMPTY = _Set()


class RecordStore:
    """Sets of valid records by key. `now` gives unix seconds, corrected as spec/discovery/records.md says."""

    def __init__(self, now: Callable[[], float], limits: StoreLimits | None = None) -> None:
        self._now = now
        self._limits = limits or StoreLimits()
        self._sets: dict[bytes, _Set] = {}
        self._split_until: dict[bytes, float] = {}
        # When entries and splits expire, soonest first. The time of a replaced entry stays here until then.
        self._ends: list[tuple[float, bytes]] = []
        self._count = 0
        self._bytes = 0
        self._storer_bytes: Counter[PeerId] = Counter()
        self._network_bytes: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many records there are."""
        self._expire()
        return self._count

    @property
    def used_bytes(self) -> int:
        self._expire()
        return self._bytes

    def get(self, key: bytes) -> list[VerifiedRecord]:
        """The valid records under `key`, one for each slot."""
        self._expire()
        return [entry.record for entry in self._sets.get(key, _EMPTY).entries.values()]

    def get_encoded(self, key: bytes) -> tuple[bytes, ...]:
        """The valid records under `key`, encoded as they arrived."""
        self._expire()
        return tuple(entry.data for entry in self._sets.get(key, _EMPTY).entries.values())

    def is_split(self, key: bytes) -> bool:
        """Whether a record that may still be valid was refused because `key` was full: look at its parts too."""
        self._expire()
        return key in self._split_until

    def put(
        self, key: bytes, data: bytes, *, storer: PeerId, source: IPv4Address | IPv6Address | None = None
    ) -> Outcome:
        """Keep an encoded record that `storer` sent from `source` (None: unknown, or stored by ourselves)."""
        self._expire()
        held = self._sets.get(key, _EMPTY)
        if data in held.encoded:
            return "known"
        try:
            record = open_record(SignedRecord.decode(data), now=self._now(), key=key)
        except RemoteProtocolError:
            return "invalid"
        old = held.entries.get(record.slot)
        if old is not None and not replaces(record, old.record):
            return "older"
        entry = _Entry(record, data, storer, public_network(source))
        if not self._has_room(entry, old) or not self._storer_has_place(entry, held, old):
            return "quota"
        if not self._has_place(entry, held, old):
            self._split(key, record.body.expires)
            return "full"
        if old is not None:
            self._remove(key, old)
        self._add(key, entry)
        return "stored"

    def _has_room(self, new: _Entry, old: _Entry | None) -> bool:
        """Whether every share of the store suffices once `new` has taken the place of `old`."""
        freed = 0 if old is None else len(old.data)
        freed_storer = freed if old is not None and old.storer == new.storer else 0
        freed_network = freed if old is not None and old.network == new.network else 0
        size = len(new.data)
        return (
            self._bytes + size - freed <= self._limits.total_bytes
            and self._storer_bytes[new.storer] + size - freed_storer <= self._limits.storer_bytes
            and (
                new.network is None
                or self._network_bytes[new.network] + size - freed_network <= self._limits.network_bytes
            )
        )

    def _storer_has_place(self, new: _Entry, held: _Set, old: _Entry | None) -> bool:
        """Whether the storer has a place left under the key. Honest storers store only what they announce
        themselves.
        """
        others = held.of_storer[new.storer] - (old is not None and old.storer == new.storer)
        return others < self._limits.storer_records_a_key

    def _has_place(self, new: _Entry, held: _Set, old: _Entry | None) -> bool:
        """Whether the key has a place left, and one for this network: one attacker's many peers must not fill the
        key.
        """
        if len(held.entries) - (old is not None) >= self._limits.records_a_key:
            return False
        if new.network is None:
            return True
        in_network = held.of_network[new.network] - (old is not None and old.network == new.network)
        return in_network < self._limits.network_records_a_key

    def _add(self, key: bytes, entry: _Entry) -> None:
        self._sets.setdefault(key, _Set()).add(entry)
        self._charge(entry, 1)
        self._end(entry.record.body.expires, key)

    def _remove(self, key: bytes, entry: _Entry) -> None:
        held = self._sets[key]
        held.remove(entry)
        if not held.entries:
            del self._sets[key]
        self._charge(entry, -1)

    def _charge(self, entry: _Entry, sign: int) -> None:
        size = sign * len(entry.data)
        self._count += sign
        self._bytes += size
        _add_to(self._storer_bytes, entry.storer, size)
        if entry.network is not None:
            _add_to(self._network_bytes, entry.network, size)

    def _split(self, key: bytes, until: float) -> None:
        if until > self._split_until.get(key, 0.0):
            self._split_until[key] = until
            self._end(until, key)

    def _end(self, when: float, key: bytes) -> None:
        heapq.heappush(self._ends, (when, key))
        if len(self._ends) > 2 * self._count + len(self._split_until) + _SPARE_ENDS:
            self._ends = [
                (entry.record.body.expires, key) for key, held in self._sets.items() for entry in held.entries.values()
            ]
            self._ends += [(until, key) for key, until in self._split_until.items()]
            heapq.heapify(self._ends)

    def _expire(self) -> None:
        now = self._now()
        while self._ends and self._ends[0][0] <= now:
            _, key = heapq.heappop(self._ends)
            entries = self._sets.get(key, _EMPTY).entries.values()
            ended = [entry for entry in entries if entry.record.body.expires <= now]
            for entry in ended:
                self._remove(key, entry)
            if self._split_until.get(key, now + 1) <= now:
                del self._split_until[key]


def _add_to(counter: Counter[Name], name: Name, size: int) -> None:
    counter[name] += size
    if not counter[name]:
        # Attackers can make up any number of names: keep no name without records.
        del counter[name]

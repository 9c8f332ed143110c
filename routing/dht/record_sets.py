"""Sets of records: the DHT keys under which they are stored, and which of the records found there count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import RecordSubject, VerifiedRecord, replaces
from peerd.protocol.records.keys import MAX_SPLITS, catalogue_key, peer_key, server_key

# A full key splits by the first four bits of the announcer's node id, and a full part by the next four.
_NIBBLES = range(16)


class PartialView(Exception):
    """Too few of the peers that should hold a set answered: further records may exist."""


@dataclass(frozen=True, slots=True)
class RecordKey:
    """The DHT key of a set of records, or of a part of it.

    key_of: makes the key of the part whose announcers' node ids begin with these nibbles; None where it never splits.
    """

    key: bytes
    key_of: Callable[..., bytes] | None = field(default=None, compare=False)
    nibbles: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[RecordKey, ...]:
        """The parts over which the set spreads once it is full."""
        key_of = self.key_of
        if key_of is None or len(self.nibbles) >= MAX_SPLITS:
            return ()
        paths = [(*self.nibbles, nibble) for nibble in _NIBBLES]
        return tuple(RecordKey(key_of(*path), key_of, path) for path in paths)


class RecordSource(Protocol):
    """Finds the records of sets: the DHT."""

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        """The valid records of each set, the newest of each slot.

        whole: raise PartialView if too few peers answered.
        """


def servers_of(model: bytes, shard: int) -> RecordKey:
    """The key under which the servers of one shard of a model announce themselves."""
    return RecordKey(server_key(model, shard), partial(server_key, model, shard))


def words_for_models() -> RecordKey:
    """The key under which servers announce the names of their models."""
    return RecordKey(catalogue_key(), catalogue_key)


def addresses_of(peer_id: PeerId) -> RecordKey:
    """The key under which a peer announces its addresses."""
    return RecordKey(peer_key(peer_id))


def newest(records: Iterable[VerifiedRecord]) -> list[VerifiedRecord]:
    """For each slot the record that replaces the others, in order of first appearance."""
    best: dict[RecordSubject, VerifiedRecord] = {}
    for record in records:
        old = best.get(record.slot)
        if old is None or replaces(record, old):
            best[record.slot] = record
    return list(best.values())

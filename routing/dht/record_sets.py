"""Sets of records: the DHT keys under which they are stored, and which of the records found there count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from peerd.protocol.identity import PeerId
from peerd.protocol.records.bodies import catalogue_key
from peerd.protocol.records.envelope import Slot, VerifiedRecord, peer_key, replaces, server_key

# A full key splits by the first four bits of the announcer's node id.
_NIBBLES = range(16)


class PartialView(Exception):
    """Too few of the peers that should hold a set answered: further records may exist."""


@dataclass(frozen=True, slots=True)
class RecordKey:
    """The DHT key of a set of records, and the keys of the parts over which it spreads once it is full."""

    key: bytes
    parts: tuple[bytes, ...] = ()


class RecordSource(Protocol):
    """Finds the records of sets: the DHT."""

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        """The valid records of each set, the newest of each slot.

        whole: raise PartialView if too few peers answered.
        """


def servers_of(model: bytes, shard: int) -> RecordKey:
    """The key under which the servers of one shard of a model announce themselves."""
    return RecordKey(server_key(model, shard), tuple(server_key(model, shard, nibble) for nibble in _NIBBLES))


def words_for_models() -> RecordKey:
    """The key under which servers announce the names of their models."""
    return RecordKey(catalogue_key(), tuple(catalogue_key(nibble) for nibble in _NIBBLES))


def addresses_of(peer_id: PeerId) -> RecordKey:
    """The key under which a peer announces its addresses."""
    return RecordKey(peer_key(peer_id))


def newest(records: Iterable[VerifiedRecord]) -> list[VerifiedRecord]:
    """For each slot the record that replaces the others, in order of first appearance."""
    best: dict[Slot, VerifiedRecord] = {}
    for record in records:
        old = best.get(record.slot)
        if old is None or replaces(record, old):
            best[record.slot] = record
    return list(best.values())

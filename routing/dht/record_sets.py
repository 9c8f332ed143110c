"""Sets of records: where in the DHT they are, and which of the records found there count.

Knows keys and newness; knows no peers and no time: expired records are gone before they come here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from peerd.protocol.identity import PeerId
from peerd.protocol.records.bodies import catalogue_key
from peerd.protocol.records.envelope import Slot, VerifiedRecord, peer_key, replaces, server_key

# A full key splits by the first four bits of the announcer's id.
_NIBBLES = range(16)


class PartialView(Exception):
    """Too few of those who should have a set's records answered: there may be others."""


@dataclass(frozen=True, slots=True)
class RecordKey:
    """Where a set of records is, and the parts over which it spreads once it is full."""

    key: bytes
    parts: tuple[bytes, ...] = ()


class RecordSource(Protocol):
    """Who finds the records of sets: the DHT."""

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        """The valid records of each set, the newest of each slot. Raises PartialView if they must be `whole`."""


def servers_of(model: bytes, shard: int) -> RecordKey:
    """Where the servers of one shard of a model announce themselves."""
    return RecordKey(server_key(model, shard), tuple(server_key(model, shard, nibble) for nibble in _NIBBLES))


def words_for_models() -> RecordKey:
    """Where servers announce what their models are called."""
    return RecordKey(catalogue_key(), tuple(catalogue_key(nibble) for nibble in _NIBBLES))


def addresses_of(peer_id: PeerId) -> RecordKey:
    """Where a peer announces its addresses."""
    return RecordKey(peer_key(peer_id))


def newest(records: Iterable[VerifiedRecord]) -> list[VerifiedRecord]:
    """Of each slot the record that replaces the others, in order of first appearance."""
    best: dict[Slot, VerifiedRecord] = {}
    for record in records:
        old = best.get(record.slot)
        if old is None or replaces(record, old):
            best[record.slot] = record
    return list(best.values())

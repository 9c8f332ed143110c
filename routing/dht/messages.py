"""The messages of the DHT: four questions and their answers (spec/discovery/dht.md).

A header holds 16 KiB, so contacts are cut to what 20 of them may take, and records travel in the message's body as
they were signed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.encoding.schema import (
    Message,
    binary,
    boolean,
    built,
    choice,
    group,
    many,
    optional,
    required,
    text,
)
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import NODE_ID_BYTES, PEER_ID_CHARS, PeerId
from peerd.protocol.records.envelope import MAX_RECORD_BYTES
from peerd.routing.dht.table import Contact, PeerNode

DHT_PROTOCOL = "/peerd/dht/1"

# Kademlia's k, for tables and answers (paper, 2.1): with this many peers, it is unlikely that all fail within an hour.
MAX_CONTACTS = 20
# How many peers hold a record. It is put anew every 20 s instead of every hour: even if a third of a swarm fails at
# once, only one record in a million has no holder left.
REPLICAS = 12
# 20 contacts with 4 addresses of 128 characters take 11 KiB of a header's 16.
MAX_CONTACT_ADDRESSES = 4
MAX_CONTACT_ADDRESS_CHARS = 128
# The most records under one key.
MAX_RECORDS = 256
# Digests of records stand for a set that is larger than this: asking for what is missing takes another round trip.
WHOLE_SET_BYTES = 4096
# A lookup salts its digests, so that nobody can make a record with the digest of another one.
SALT_BYTES = 8
DIGEST_BYTES = 6
# An announcer mostly puts one record at a time; a few more let one request carry several spans.
MAX_STORED_AT_ONCE = 16

Outcome = Literal["stored", "known", "older", "full", "quota", "invalid"]
"""The outcome for a record that was sent to be stored. "stored": kept; "known": it was there already; "older": a newer
record is there; "full": the key has no place left, so its set splits; "quota": the storer or its network has used
its share; "invalid": the record is not valid.
"""

# Replies name the same few hundred peers again and again.
_parse_address = lru_cache(maxsize=8192)(Multiaddr.parse)

_key = binary(NODE_ID_BYTES, NODE_ID_BYTES)
_address_texts = many(text(MAX_CONTACT_ADDRESS_CHARS), MAX_CONTACT_ADDRESSES)


def _addresses(value: Any) -> tuple[Multiaddr, ...]:
    """The addresses that we understand: a newer peer may have kinds of addresses that we lack."""
    understood = []
    for address in _address_texts(value):
        with contextlib.suppress(ValueError):
            understood.append(_parse_address(address))
    return tuple(understood)


def _node(peer_id: str, addresses: tuple[Multiaddr, ...]) -> PeerNode:
    return PeerNode(Contact(PeerId(peer_id), addresses))


_contact = built(group(text(PEER_ID_CHARS), _addresses), _node)


@lru_cache(maxsize=8192)
def _known_contact(peer_id: str, addresses: tuple[str, ...]) -> PeerNode:
    node: PeerNode = _contact((peer_id, addresses))
    return node


def _named(value: Any) -> PeerNode:
    """A contact. The checks of texts that were checked before are cached."""
    if type(value) is list and len(value) == 2 and type(value[1]) in (list, tuple):
        # A value that holds a list or a map cannot be a cache key; it is refused below like any other wrong value.
        with contextlib.suppress(TypeError):
            return _known_contact(value[0], tuple(value[1]))
    node: PeerNode = _contact(value)
    return node


_nodes = many(_named, MAX_CONTACTS)


_joined_digests = binary(0, DIGEST_BYTES * MAX_RECORDS)


def _digests(value: Any) -> tuple[bytes, ...]:
    joined = _joined_digests(value)
    if len(joined) % DIGEST_BYTES:
        raise ValueError(f"digests of {DIGEST_BYTES} bytes each")
    return tuple(joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES))


def _dump_addresses(addresses: Sequence[Multiaddr]) -> list[str]:
    return [str(address) for address in addresses]


def _dump_nodes(nodes: Sequence[PeerNode]) -> list[list[Any]]:
    return [[node.contact.peer_id, node.address_texts] for node in nodes]


def contact_addresses(addresses: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
    """As many of a peer's own addresses as a contact holds: direct ones that can be dialled."""
    plain = [address.with_peer(None) for address in addresses if address.is_dialable and address.relay is None]
    return tuple(a for a in plain if len(str(a)) <= MAX_CONTACT_ADDRESS_CHARS)[:MAX_CONTACT_ADDRESSES]


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Asks whether a peer is there. `addresses`, in all questions: where the sender can be dialled; none makes it a
    client.
    """

    TYPE: ClassVar[str] = "ping"

    addresses: tuple[Multiaddr, ...] = optional(_addresses, (), _dump_addresses)


@dataclass(frozen=True, slots=True)
class FindNode(Message):
    """Asks for the known peers nearest to `key` (20 bytes)."""

    TYPE: ClassVar[str] = "find_node"

    key: bytes = required(_key)
    addresses: tuple[Multiaddr, ...] = optional(_addresses, (), _dump_addresses)


@dataclass(frozen=True, slots=True)
class FindValue(Message):
    """Asks for the records under `key`, and for the known peers nearest to it.

    salt: with it, the answer may hold digests instead of records. only: the digests, under that salt, of the records
    that are wanted; () for all.
    """

    TYPE: ClassVar[str] = "find_value"

    key: bytes = required(_key)
    addresses: tuple[Multiaddr, ...] = optional(_addresses, (), _dump_addresses)
    salt: bytes = optional(binary(SALT_BYTES, SALT_BYTES), b"")
    only: tuple[bytes, ...] = optional(_digests, (), b"".join)


@dataclass(frozen=True, slots=True)
class Store(Message):
    """Asks to keep the records in the message's body under `key`."""

    TYPE: ClassVar[str] = "store"

    key: bytes = required(_key)
    addresses: tuple[Multiaddr, ...] = optional(_addresses, (), _dump_addresses)


Question = Ping | FindNode | FindValue | Store
QUESTIONS: tuple[type[Question], ...] = (Ping, FindNode, FindValue, Store)


@dataclass(frozen=True, slots=True)
class Pong(Message):
    TYPE: ClassVar[str] = "pong"


@dataclass(frozen=True, slots=True)
class Found(Message):
    """The nearest peers, nearest first; the records are in the message's body.

    split: whether the set did not fit under this key, so that some records are under the keys by nibble.
    digests: of the records, in place of them.
    """

    TYPE: ClassVar[str] = "found"

    nodes: tuple[PeerNode, ...] = optional(_nodes, (), _dump_nodes)
    split: bool = optional(boolean, False)
    digests: tuple[bytes, ...] = optional(_digests, (), b"".join)


@dataclass(frozen=True, slots=True)
class Stored(Message):
    """The outcome of each record, in their order."""

    TYPE: ClassVar[str] = "stored"

    outcomes: tuple[Outcome, ...] = required(
        many(choice("stored", "known", "older", "full", "quota", "invalid"), MAX_STORED_AT_ONCE), list
    )


@dataclass(frozen=True, slots=True)
class Packet:
    """A question or an answer as it travels: the header's fields, and the records of the body."""

    header: dict[str, Any]
    records: tuple[bytes, ...] = ()


def pack_records(records: Sequence[bytes]) -> bytes:
    """A message's body: each record after its length in two bytes, big-endian."""
    return b"".join(part for record in records for part in (len(record).to_bytes(2, "big"), record))


def unpack_records(body: bytes | memoryview) -> tuple[bytes, ...]:
    """The records of a body. Raises RemoteProtocolError unless they are at most 256 records of at most 1024 bytes.

    A record that is too long or cut short makes the whole body invalid: the records behind it cannot be found.
    """
    records: list[bytes] = []
    at = 0
    while at < len(body):
        size = int.from_bytes(body[at : at + 2], "big")
        record = bytes(body[at + 2 : at + 2 + size])
        if len(body) < at + 2 or len(record) < size or size > MAX_RECORD_BYTES or len(records) == MAX_RECORDS:
            raise RemoteProtocolError(f"a DHT message carries up to {MAX_RECORDS} records of {MAX_RECORD_BYTES} bytes")
        records.append(record)
        at += 2 + size
    return tuple(records)

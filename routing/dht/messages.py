"""What DHT peers say to each other: four questions and their answers (spec/dht.md).

Knows fields and limits; knows neither records, which travel beside the fields as they were signed,
nor who may say what. The difficulty is size: a header holds 16 KiB, so contacts are cut to what
20 of them may take there, and records go into the message's body.
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

# Kademlia's k, of tables and answers (paper, 2.1): so many that all of them failing within an hour is unlikely.
MAX_CONTACTS = 20
# Peers that hold a record. It is put anew within 20 s and not within an hour: even if a third of a swarm fails at
# once, one record in a million has no holder left.
REPLICAS = 12
# 20 contacts of 4 addresses of 128 characters take 11 KiB of a header's 16.
MAX_CONTACT_ADDRESSES = 4
MAX_CONTACT_ADDRESS_CHARS = 128
# A key's set.
MAX_RECORDS = 256
# An announcer puts one record at a time; a few more let one request carry several spans.
MAX_STORED_AT_ONCE = 16

Outcome = Literal["stored", "known", "older", "full", "quota", "invalid"]
"""What became of a record sent to be stored: kept; there already; a newer one is there; its key has no
place left, so that its set splits; the storer or its network has used its share; not valid."""

# Replies name the same few hundred peers over and over.
_parse_address = lru_cache(maxsize=8192)(Multiaddr.parse)

_key = binary(NODE_ID_BYTES, NODE_ID_BYTES)
_address_texts = many(text(MAX_CONTACT_ADDRESS_CHARS), MAX_CONTACT_ADDRESSES)


def _addresses(value: Any) -> tuple[Multiaddr, ...]:
    """Those that we understand: a newer peer may have kinds of addresses that we lack."""
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
    """A contact: the checks of texts that were met before need not be made again."""
    if type(value) is list and len(value) == 2 and type(value[1]) in (list, tuple):
        # What cannot be looked up because it holds a list or a map is refused below like any other.
        with contextlib.suppress(TypeError):
            return _known_contact(value[0], tuple(value[1]))
    node: PeerNode = _contact(value)
    return node


_nodes = many(_named, MAX_CONTACTS)


def _dump_addresses(addresses: Sequence[Multiaddr]) -> list[str]:
    return [str(address) for address in addresses]


def _dump_nodes(nodes: Sequence[PeerNode]) -> list[list[Any]]:
    return [[node.contact.peer_id, node.address_texts] for node in nodes]


def contact_addresses(addresses: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
    """As many of a peer's own addresses as a contact holds: direct ones that somebody could dial."""
    plain = [address.with_peer(None) for address in addresses if address.is_dialable and address.relay is None]
    return tuple(a for a in plain if len(str(a)) <= MAX_CONTACT_ADDRESS_CHARS)[:MAX_CONTACT_ADDRESSES]


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Are you there? `addresses`, here and below: where the sender can be dialled; none makes it a client."""

    TYPE: ClassVar[str] = "ping"

    addresses: tuple[Multiaddr, ...] = optional(_addresses, (), _dump_addresses)


@dataclass(frozen=True, slots=True)
class FindNode(Message):
    """Which peers do you know nearest to `key` (20 bytes)?"""

    TYPE: ClassVar[str] = "find_node"

    key: bytes = required(_key)
    addresses: tuple[Multiaddr, ...] = optional(_addresses, (), _dump_addresses)


@dataclass(frozen=True, slots=True)
class FindValue(Message):
    """Which records do you hold under `key`, and which peers do you know nearest to it?"""

    TYPE: ClassVar[str] = "find_value"

    key: bytes = required(_key)
    addresses: tuple[Multiaddr, ...] = optional(_addresses, (), _dump_addresses)


@dataclass(frozen=True, slots=True)
class Store(Message):
    """Keep these records, which travel with the message, under `key`."""

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
    """The nearest peers, nearest first; the records travel with the message.

    split: the set did not fit under this key, so that some of it is under the keys by nibble.
    """

    TYPE: ClassVar[str] = "found"

    nodes: tuple[PeerNode, ...] = optional(_nodes, (), _dump_nodes)
    split: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class Stored(Message):
    """What became of each record, in their order."""

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
    """The records of a body. Raises RemoteProtocolError unless it is at most 256 of at most 1024 bytes.

    A record that is longer or cut short spoils the body: nothing after it can be found.
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

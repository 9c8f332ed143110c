from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kademlia.node import Node

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.encoding.packing import pack, unpack
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import Identity
from peerd.routing.dht.messages import (
    MAX_CONTACT_ADDRESS_CHARS,
    MAX_CONTACT_ADDRESSES,
    MAX_RECORDS,
    QUESTIONS,
    REPLICAS,
    Found,
    Pong,
    Stored,
    contact_addresses,
    pack_records,
    unpack_records,
)
from peerd.routing.dht.table import Contact, PeerNode

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/discovery/dht.json").read_text())
MESSAGES = VECTORS["messages"]
ALLOWED: dict[str, tuple[type[Message], ...]] = {"question": QUESTIONS, "answer": (Pong, Found, Stored)}


def as_json(message: Message) -> Any:
    header = {name: value.hex() if isinstance(value, bytes) else value for name, value in message.to_header().items()}
    return json.loads(json.dumps(header))


@pytest.mark.parametrize("vector", MESSAGES, ids=[vector["name"] for vector in MESSAGES])
def test_messages_are_read_as_the_vectors_say(vector: dict[str, Any]) -> None:
    def read() -> tuple[Message, tuple[bytes, ...]]:
        header = unpack(bytes.fromhex(vector["header"]))
        return parse(header, ALLOWED[vector["kind"]]), unpack_records(bytes.fromhex(vector["body"]))

    if "error" in vector:
        with pytest.raises(RemoteProtocolError):
            read()
        return
    message, records = read()
    assert as_json(message) == vector["fields"]
    assert [record.hex() for record in records] == vector["records"]
    assert pack_records(records).hex() == vector["body"]


@pytest.mark.parametrize("vector", VECTORS["distances"])
def test_distances_order_peers_as_the_vectors_say(vector: dict[str, Any]) -> None:
    nodes = [PeerNode(Contact(Identity.from_seed(bytes([n]) * 32).peer_id)) for n in range(1, 9)]
    nodes.sort(key=Node(bytes.fromhex(vector["key"])).distance_to)
    assert [node.contact.peer_id for node in nodes] == vector["nearest_first"]


def test_the_longest_answer_fits_a_header() -> None:
    host = ".".join(["a" * 60] * 2)
    address = f"/dns4/{host}"[: MAX_CONTACT_ADDRESS_CHARS - len("/tcp/31330/wss")] + "/tcp/31330/wss"
    assert len(address) == MAX_CONTACT_ADDRESS_CHARS
    contact = Contact(Identity.from_seed(bytes(32)).peer_id, (Multiaddr.parse(address),) * MAX_CONTACT_ADDRESSES)
    found = Found((PeerNode(contact),) * REPLICAS, True)
    assert len(pack(found.to_header())) < 16 * 1024


def test_a_body_holds_a_whole_set_and_no_more() -> None:
    records = tuple(bytes([number]) * 1024 for number in range(MAX_RECORDS))
    assert unpack_records(memoryview(pack_records(records))) == records
    with pytest.raises(RemoteProtocolError, match="256 records"):
        unpack_records(pack_records((*records, b"")))


def test_a_contact_has_direct_addresses_that_can_be_dialled() -> None:
    peer_id = Identity.from_seed(bytes(32)).peer_id
    plain = "/ip4/203.0.113.1/tcp/31330/ws"
    texts = [
        f"{plain}/p2p/{peer_id}",
        "/ip4/0.0.0.0/tcp/31330/ws",
        "/ip4/203.0.113.2/tcp/0/ws",
        f"/ip4/203.0.113.3/tcp/1/ws/p2p/{peer_id}/p2p-circuit",
        f"/dns/{'.'.join(['a' * 60] * 3)}/tcp/1/ws",
        *(f"/ip4/203.0.113.1/tcp/{port}/ws" for port in range(1, 9)),
    ]
    addresses = contact_addresses([Multiaddr.parse(text) for text in texts])
    assert [str(address) for address in addresses] == [plain, *texts[5:8]]

"""A large set is sent once, however many peers hold it; nobody who lies about what it has hides a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import ServerRecord, sign_record
from peerd.protocol.records.keys import server_key
from peerd.routing.dht.messages import DIGEST_BYTES, SALT_BYTES, WHOLE_SET_BYTES, FindValue, Found, Packet
from peerd.routing.dht.record_sets import servers_of
from peerd.routing.dht.rpc import FindReply
from peerd.routing.dht.set_reading import SetReader, digest_of, digests_of
from peerd.routing.dht.table import Contact, PeerNode

MakeServer = Callable[..., ServerRecord]
# Fixtures come from conftest.py, whose classes a test module cannot import.
Network = Any

MODEL = bytes(range(32))
KEY = server_key(MODEL, 0)
SALT = bytes(SALT_BYTES)


class Traffic:
    """Counts the bytes of records in answers, and can change answers on their way."""

    def __init__(self, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record_bytes = 0
        self.questions: list[dict[str, Any]] = []
        transport = type(next(iter(network.peers.values())).dht._protocol._transport)
        original = transport.request

        async def request(carrier, contact, packet):
            answer = await original(carrier, contact, packet)
            if packet.header["type"] == "find_value":
                self.questions.append(packet.header)
                self.record_bytes += sum(map(len, answer.records))
            return answer

        monkeypatch.setattr(transport, "request", request)


async def filled(network: Network, server_body: MakeServer, count: int) -> list[bytes]:
    """A swarm whose peers all hold the same set of so many records, and one that holds nothing."""
    peers = await network.add_joined(12)
    records = []
    for number in range(count):
        identity = Identity.from_seed((10**6 + number).to_bytes(32, "big"))
        records.append(sign_record(identity, server_body(expires=1_800_000_300.0)).encode())
    for peer in peers:
        for record in records:
            assert peer.store.put(KEY, record, storer=peer.peer_id) in ("stored", "quota")
    return records


@pytest.fixture
def big(network: Network) -> Network:
    from peerd.routing.dht.store import StoreLimits

    network.limits = StoreLimits(storer_records_a_key=256)
    return network


async def reader_of(network: Network) -> Any:
    (client,) = await network.add_joined(1, client=True)
    return client


async def test_a_large_set_travels_once(big, server_body, monkeypatch):
    records = await filled(big, server_body, 100)
    client = await reader_of(big)
    traffic = Traffic(big, monkeypatch)
    found = await client.dht.get(servers_of(MODEL, 0))
    assert {one.signed.encode() for one in found} == set(records)
    assert len(traffic.questions) >= 8
    assert traffic.record_bytes == sum(map(len, records))


async def test_a_small_set_is_answered_whole_by_each(big, server_body, monkeypatch):
    records = await filled(big, server_body, 3)
    assert sum(map(len, records)) <= WHOLE_SET_BYTES
    client = await reader_of(big)
    traffic = Traffic(big, monkeypatch)
    assert len(await client.dht.get(servers_of(MODEL, 0))) == 3
    assert not any("only" in question for question in traffic.questions)


async def test_what_single_peers_have_beyond_the_others_is_fetched_from_them(big, server_body):
    records = await filled(big, server_body, 60)
    more = []
    for number, peer in enumerate(list(big.peers.values())[:12]):
        identity = Identity.from_seed((2 * 10**6 + number).to_bytes(32, "big"))
        more.append(sign_record(identity, server_body(expires=1_800_000_300.0)).encode())
        assert peer.store.put(KEY, more[-1], storer=peer.peer_id) == "stored"
    client = await reader_of(big)
    found = {one.signed.encode() for one in await client.dht.get(servers_of(MODEL, 0))}
    assert set(records) <= found
    # Eight of the twelve were asked.
    assert len(found & set(more)) >= 8


async def test_one_that_says_that_it_has_what_it_does_not_send_hides_nothing(big, server_body):
    records = await filled(big, server_body, 60)

    def claims_all(packet: Packet) -> Packet:
        salt = packet.header.get("salt")
        if salt is None or "only" in packet.header:
            return Packet(Found().to_header())
        return Packet(Found(digests=digests_of(salt, records)).to_header())

    for peer in list(big.peers.values())[:6]:
        big.liars[peer.peer_id] = claims_all
    client = await reader_of(big)
    found = await client.dht.get(servers_of(MODEL, 0))
    assert {one.signed.encode() for one in found} == set(records)


async def test_peers_that_know_no_digests_are_understood(big, server_body, monkeypatch):
    records = await filled(big, server_body, 60)
    old = FindValue.from_header

    def without_salt(header):
        return old({name: value for name, value in header.items() if name not in ("salt", "only")})

    monkeypatch.setattr(FindValue, "from_header", without_salt)
    client = await reader_of(big)
    found = await client.dht.get(servers_of(MODEL, 0))
    assert {one.signed.encode() for one in found} == set(records)


def test_a_digest_depends_on_the_lookup():
    assert len(digest_of(SALT, b"a")) == DIGEST_BYTES
    assert digest_of(SALT, b"a") != digest_of(bytes([1]) * SALT_BYTES, b"a")
    assert digest_of(SALT, b"a") != digest_of(SALT, b"b")


async def test_one_that_keeps_back_what_it_claims_makes_no_view_partial(big, server_body):
    records = await filled(big, server_body, 60)
    made_up = (bytes(DIGEST_BYTES),)
    liar = next(iter(big.peers))
    big.liars[liar] = lambda packet: Packet(Found(digests=made_up if "salt" in packet.header else ()).to_header())
    for peer in list(big.peers.values())[1:]:
        found = await peer.dht.get(servers_of(MODEL, 0), whole=True)
        assert {one.signed.encode() for one in found} == set(records)


async def test_one_that_names_what_it_has_and_is_silent_then_holds_nobody_up(big, server_body, monkeypatch):
    records = await filled(big, server_body, 60)
    client = await reader_of(big)
    transport = type(client.dht._protocol._transport)
    original = transport.request
    silent: list[Any] = []

    async def request(carrier, contact, packet):
        if packet.header["type"] == "find_value":
            if "salt" not in packet.header:
                return Packet(Found().to_header())
            if "only" in packet.header and not silent:
                silent.append(contact.peer_id)
                await trio.sleep_forever()
        return await original(carrier, contact, packet)

    monkeypatch.setattr(transport, "request", request)
    started = trio.current_time()
    found = await client.dht.get(servers_of(MODEL, 0))
    assert {one.signed.encode() for one in found} == set(records)
    assert silent
    assert trio.current_time() - started < 1.5


class Renewing:
    """A holder whose records are renewed between its digests and the question for single ones."""

    def __init__(self, records: list[bytes], newer: list[bytes]) -> None:
        self.records, self.newer = records, newer

    async def call_find_value(self, node, target, salt=b"", only=()):
        await trio.lowlevel.checkpoint()
        if only:
            self.records = self.newer
            return Found(), tuple(record for record in self.records if digest_of(salt, record) in only)
        return Found(digests=digests_of(salt, self.records)), ()


async def test_a_holder_whose_records_are_renewed_meanwhile_counts_as_one_that_answered():
    node = PeerNode(Contact(Identity.from_seed(bytes(32)).peer_id, ()))
    holder = Renewing([b"old", b"same"], [b"new", b"same"])

    class Protocol:
        async def call_find_value(self, *arguments):
            found, records = await holder.call_find_value(*arguments)
            return FindReply([], records, False, found.digests)

    reader = SetReader(Protocol(), SALT)
    reader._is_asked_for_all = True
    await reader.ask(node, node)
    assert await reader.complete(node, ()) == {b"new", b"same"}
    assert reader.unsent == set()

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import trio

from peerd.protocol.errors import InvalidRequest, RemoteProtocolError
from peerd.protocol.identity import Identity, node_id_of
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, SignedRecord, sign_record
from peerd.protocol.records.keys import peer_key, server_key
from peerd.protocol.span import Span
from peerd.routing.dht.messages import REPLICAS, Found, Packet
from peerd.routing.dht.record_sets import PartialView, addresses_of, servers_of
from peerd.routing.dht.store import StoreLimits
from peerd.routing.dht.table import load_contacts

MakeServer = Callable[..., ServerRecord]
MakePeer = Callable[..., PeerRecord]
# Fixtures come from conftest.py, whose classes a test module cannot import.
Network = Any
Peer = Any

MODEL = bytes(range(32))
SHARD_0 = server_key(MODEL, 0)


def distance(key: bytes, peer: Peer) -> int:
    return int.from_bytes(node_id_of(peer.peer_id), "big") ^ int.from_bytes(key, "big")


def holders(network: Network, key: bytes) -> list[Peer]:
    return [peer for peer in network.peers.values() if peer.store.get(key)]


def announcers(records: list[Any]) -> set[str]:
    return {record.peer_id for record in records}


@pytest.mark.slow
async def test_every_record_is_found_with_30_percent_of_200_peers_dead(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    network.loss = 0.01
    peers = await network.add_joined(200)
    sharing = [peers[number] for number in range(0, 60, 2)]
    for shard, peer in enumerate(sharing):
        body = server_body(span=Span(16 * shard, 16 * shard + 4), expires=unix_now() + 300)
        assert await peer.dht.put(sign_record(peer.identity, body)) >= REPLICAS - 2
    network.kill(*network.random.sample(peers, 60))
    alive = [peer for peer in peers if peer.peer_id not in network.dead]
    took_s = []
    for shard, peer in enumerate(sharing):
        started = trio.current_time()
        found = await network.random.choice(alive).dht.get(servers_of(MODEL, shard))
        took_s.append(trio.current_time() - started)
        assert announcers(found) == {peer.peer_id}
    # A dead peer costs a request 3 s; half the lookups, though all meet some, take a tenth of that.
    assert sorted(took_s)[len(took_s) // 2] < 0.3


@pytest.mark.slow
async def test_a_record_lies_with_exactly_the_nearest_peers(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    peers = await network.add_joined(80)
    right = 0
    for shard, peer in enumerate(peers[:20]):
        body = server_body(span=Span(16 * shard, 16 * shard + 4), expires=unix_now() + 300)
        assert await peer.dht.put(sign_record(peer.identity, body)) == REPLICAS
        key = server_key(MODEL, shard)
        assert len(holders(network, key)) == REPLICAS
        nearest = sorted(peers, key=lambda other: distance(key, other))[:REPLICAS]
        right += len({peer.peer_id for peer in nearest} & {peer.peer_id for peer in holders(network, key)})
    assert right >= 20 * REPLICAS - 2


async def test_in_a_small_swarm_every_peer_holds_every_record(network: Network, server_body: MakeServer) -> None:
    peers = await network.add_joined(5)
    client = (await network.add_joined(1, client=True))[0]
    assert await peers[2].dht.put(sign_record(peers[2].identity, server_body(span=Span(8, 24)))) == 5
    for key in (SHARD_0, server_key(MODEL, 1)):
        assert len(holders(network, key)) == 5
    assert announcers(await client.dht.get(servers_of(MODEL, 1))) == {peers[2].peer_id}


async def test_a_peer_alone_announces_to_itself(network: Network, server_body: MakeServer) -> None:
    peer = network.add()
    assert await peer.dht.bootstrap([]) == 0
    assert await peer.dht.put(sign_record(peer.identity, server_body())) == 1
    assert announcers(await peer.dht.get(servers_of(MODEL, 0))) == {peer.peer_id}


@pytest.mark.slow
async def test_many_records_of_many_peers_come_back_as_one_set(network: Network, server_body: MakeServer) -> None:
    peers = await network.add_joined(40)
    async with trio.open_nursery() as nursery:
        for peer in peers:
            bodies = [server_body(span=Span(slot, slot + 3), slot=slot) for slot in range(4)]
            nursery.start_soon(peer.dht.put, *(sign_record(peer.identity, body) for body in bodies))
    found = await peers[7].dht.get(servers_of(MODEL, 0))
    assert len(found) == 4 * 40
    assert announcers(found) == {peer.peer_id for peer in peers}


async def test_each_peers_record_expires_by_itself(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    first, second, reader = await network.add_joined(3)
    start = unix_now()
    await first.dht.put(sign_record(first.identity, server_body(expires=start + 30)))
    await second.dht.put(sign_record(second.identity, server_body(expires=start + 60)))
    assert announcers(await reader.dht.get(servers_of(MODEL, 0))) == {first.peer_id, second.peer_id}
    await trio.sleep(30)
    assert announcers(await reader.dht.get(servers_of(MODEL, 0))) == {second.peer_id}
    await trio.sleep(30)
    assert await reader.dht.get(servers_of(MODEL, 0)) == []
    assert all(len(peer.store) == 0 for peer in network.peers.values())


async def test_an_older_write_changes_nothing(network: Network, server_body: MakeServer) -> None:
    peers = await network.add_joined(6)
    old, new = (sign_record(peers[0].identity, server_body(seq=seq)) for seq in (1, 2))
    assert await peers[0].dht.put(new) == 6
    assert await peers[1].dht.put(old) == 0
    assert [record.signed for record in await peers[2].dht.get(servers_of(MODEL, 0))] == [new]


async def test_a_stale_replica_does_not_hide_the_newest_record(network: Network, server_body: MakeServer) -> None:
    peers = await network.add_joined(6)
    old, new = (sign_record(peers[0].identity, server_body(seq=seq)) for seq in (1, 2))
    await peers[0].dht.put(old)
    peers[3].store.put(SHARD_0, new.encode(), storer=peers[0].peer_id)
    for peer in peers:
        assert [record.signed for record in await peer.dht.get(servers_of(MODEL, 0))] == [new]


async def test_forged_records_are_refused_and_hide_nobody_after_the_owner_left(
    network: Network, server_body: MakeServer
) -> None:
    peers = await network.add_joined(8)
    owner, liar, reader = peers[0], peers[1], peers[2]
    good = sign_record(owner.identity, server_body(seq=5))
    await owner.dht.put(good)
    network.kill(owner)
    forged = SignedRecord(good.public_key, good.kind, server_body(seq=6).to_payload(), good.signature)
    unsigned = replace(forged, signature=bytes(64))
    stolen = replace(sign_record(liar.identity, server_body(seq=7)), public_key=good.public_key)
    for record in (forged, unsigned, stolen):
        with pytest.raises(RemoteProtocolError, match="signature"):
            await liar.dht.put(record)
        outcomes = await liar.dht._protocol.call_store(reader.dht._own, SHARD_0, [record.encode()])
        assert outcomes == ("invalid",)
    lies = (forged.encode(), unsigned.encode(), stolen.encode(), b"noise", b"")
    network.liars[liar.peer_id] = lambda packet: Packet(Found().to_header(), lies)
    assert [record.signed for record in await reader.dht.get(servers_of(MODEL, 0))] == [good]


@pytest.mark.slow
async def test_a_full_key_loses_nobody(network: Network, server_body: MakeServer) -> None:
    network.limits = StoreLimits(records_a_key=8)
    peers = await network.add_joined(30)
    for peer in peers:
        assert await peer.dht.put(sign_record(peer.identity, server_body())) > 0
    assert max(len(peer.store.get(SHARD_0)) for peer in peers) == 8
    late = (await network.add_joined(1, client=True))[0]
    for reader in (peers[3], late):
        assert announcers(await reader.dht.get(servers_of(MODEL, 0))) == {peer.peer_id for peer in peers}


async def test_a_part_that_is_full_splits_again(network: Network, server_body: MakeServer) -> None:
    network.limits = StoreLimits(records_a_key=2)
    peers = await network.add_joined(48)
    for peer in peers:
        assert await peer.dht.put(sign_record(peer.identity, server_body())) > 0
    keys = Counter(len(nibbles) for nibbles in used_paths(peers))
    assert set(keys) == {0, 1, 2}
    client = (await network.add_joined(1, client=True))[0]
    for reader in (peers[3], client):
        assert announcers(await reader.dht.get(servers_of(MODEL, 0))) == {peer.peer_id for peer in peers}


def used_paths(peers: list[Peer]) -> set[tuple[int, ...]]:
    """The parts of the key, by their nibbles, under which records lie."""
    paths = [(), *((one,) for one in range(16)), *((one, two) for one in range(16) for two in range(16))]
    return {path for path in paths if any(peer.store.get(server_key(MODEL, 0, *path)) for peer in peers)}


async def test_one_that_says_that_a_key_is_split_makes_nobody_look_up_its_parts(
    network: Network, server_body: MakeServer
) -> None:
    peers = await network.add_joined(6)
    await peers[1].dht.put(sign_record(peers[1].identity, server_body()))
    network.liars[peers[0].peer_id] = lambda _packet: Packet(Found(split=True).to_header())
    before = len(network.requests)
    assert announcers(await peers[5].dht.get(servers_of(MODEL, 0))) == {peers[1].peer_id}
    assert len(network.requests) - before <= 8


async def test_one_peer_that_makes_up_a_hundred_others_takes_few_places(
    network: Network, server_body: MakeServer
) -> None:
    network.limits = StoreLimits(records_a_key=16, storer_records_a_key=3)
    peers = await network.add_joined(10)
    for number in range(100):
        sybil = Identity.from_seed((10**6 + number).to_bytes(32, "big"))
        await peers[0].dht.put(sign_record(sybil, server_body()))
    honest = peers[1:]
    for peer in honest:
        assert await peer.dht.put(sign_record(peer.identity, server_body())) == 10
    assert {peer.peer_id for peer in honest} <= announcers(await peers[5].dht.get(servers_of(MODEL, 0)))


async def test_a_client_is_in_nobodys_table_and_holds_nothing(network: Network, server_body: MakeServer) -> None:
    await network.add_joined(6)
    client = (await network.add_joined(1, client=True))[0]
    assert await client.dht.put(sign_record(client.identity, server_body())) == 6
    assert len(client.store) == 0
    for peer in network.peers.values():
        assert client.peer_id not in {contact.peer_id for contact in peer.dht.contacts}


async def test_a_peer_that_turns_out_unreachable_leaves_the_tables_it_was_in(network: Network) -> None:
    peers = await network.add_joined(6)
    peers[0].dht.addresses = ()
    await peers[0].dht.bootstrap([peers[1].contact])
    asked = {target for sender, target, _ in network.requests if sender == peers[0].peer_id}
    for peer in peers[1:]:
        if peer.peer_id in asked:
            assert peers[0].peer_id not in {contact.peer_id for contact in peer.dht.contacts}


async def test_dead_peers_leave_the_table(network: Network, server_body: MakeServer) -> None:
    peers = await network.add_joined(12)
    network.kill(*peers[6:])
    alive = {peer.peer_id for peer in peers[:6]}
    await peers[0].dht.put(sign_record(peers[0].identity, server_body()))
    assert {contact.peer_id for contact in peers[0].dht.contacts} == alive - {peers[0].peer_id}


async def test_a_peer_that_lost_all_contacts_joins_again(network: Network) -> None:
    peers = await network.add_joined(6)
    network.kill(*peers[:5])
    await peers[5].dht.get(addresses_of(peers[3].peer_id))
    await peers[5].dht.refresh()
    assert peers[5].dht.contacts == []
    network.dead.clear()
    await peers[5].dht.refresh()
    assert len(peers[5].dht.contacts) == 5


async def test_the_routing_table_survives_a_restart(network: Network) -> None:
    peers = await network.add_joined(8)
    kept = load_contacts(peers[3].dht.dump())
    assert kept == peers[3].dht.contacts
    again = network.add()
    assert await again.dht.bootstrap(kept) == 8


async def test_places_where_nothing_was_looked_up_for_an_hour_are_refreshed(network: Network) -> None:
    peers = await network.add_joined(30)
    await peers[0].dht.refresh()
    before = len(network.requests)
    await peers[0].dht.refresh()
    assert len(network.requests) == before
    await trio.sleep(3601)
    await peers[0].dht.refresh()
    assert len(network.requests) > before


@pytest.mark.parametrize(
    ("header", "records"),
    [
        ({}, ()),
        ({"type": "stun"}, ()),
        ({"type": "find_node"}, ()),
        ({"type": "find_node", "key": b"short"}, ()),
        ({"type": "find_node", "key": "a" * 20}, ()),
        ({"type": "find_value", "key": bytes(20), "addresses": "/ip4/1.2.3.4/tcp/1/ws"}, ()),
        ({"type": "find_value", "key": bytes(20), "addresses": ["/ip4/1.2.3.4/tcp/1/ws"] * 5}, ()),
        ({"type": "ping", "addresses": ["/dns/" + "a" * 128 + "/tcp/1/ws"]}, ()),
        ({"type": "store", "key": bytes(20)}, ()),
        ({"type": "store", "key": bytes(20)}, (b"",) * 17),
    ],
)
async def test_a_malformed_question_is_refused(
    network: Network, header: dict[str, object], records: tuple[bytes, ...]
) -> None:
    peer, other = network.add(), network.add()
    with pytest.raises(InvalidRequest):
        await peer.dht.handle(other.peer_id, Packet(header, records))


async def test_a_malformed_answer_costs_only_the_peer_that_gave_it(network: Network, peer_body: MakePeer) -> None:
    peers = await network.add_joined(8)
    await peers[0].dht.put(sign_record(peers[0].identity, peer_body()))
    answers = Random(4)
    lies = [
        Packet({"type": "pong"}),
        Packet({"type": "found", "nodes": [["12D3KooWnobody", []]]}),
        Packet({"type": "found", "nodes": [[peers[0].peer_id, []]] * 21}),
        Packet({"type": "found", "split": 1}),
    ]
    for liar in peers[1:4]:
        network.liars[liar.peer_id] = lambda packet: answers.choice(lies)
    found = await peers[5].dht.get(addresses_of(peers[0].peer_id))
    assert announcers(found) == {peers[0].peer_id}
    assert {contact.peer_id for contact in peers[5].dht.contacts}.isdisjoint(network.liars)


async def test_an_address_of_a_kind_we_do_not_know_is_skipped(network: Network) -> None:
    peer, other = network.add(), network.add()
    header = {"type": "ping", "addresses": ["/ip4/10.0.0.2/udp/4001/quic-v1", "/ip4/10.0.0.2/tcp/31330/ws"]}
    assert (await peer.dht.handle(other.peer_id, Packet(header))).header == {"type": "pong"}
    assert peer.dht.contacts == [other.contact]


async def test_a_record_under_a_foreign_key_is_refused_on_both_ways(network: Network, peer_body: MakePeer) -> None:
    peers = await network.add_joined(4)
    misplaced = sign_record(peers[0].identity, peer_body()).encode()
    key = peer_key(peers[1].peer_id)
    assert await peers[0].dht._protocol.call_store(peers[2].dht._own, key, [misplaced]) == ("invalid",)
    network.liars[peers[2].peer_id] = lambda packet: Packet(Found().to_header(), (misplaced,))
    assert await peers[3].dht.get(addresses_of(peers[1].peer_id)) == []


async def test_a_lookup_that_must_be_whole_fails_where_most_of_a_small_swarm_is_silent(
    network: Network, server_body: MakeServer
) -> None:
    alone, others = network.add(), await network.add_joined(5)
    wanted = servers_of(MODEL, 0)
    await others[0].dht.put(sign_record(others[0].identity, server_body()))
    assert len(await alone.dht.get(wanted, whole=True)) == 1
    network.kill(*others[:2])
    # Four of six are most of them, ourselves included; of three it is not even known how many answered before.
    assert len(await alone.dht.get(wanted, whole=True)) == 1
    network.kill(*others[2:])
    for _ in range(2):
        with pytest.raises(PartialView, match="0 of"):
            await alone.dht.get(wanted, whole=True)
        assert await alone.dht.get(wanted) == alone.store.get(wanted.key)


async def test_a_peer_that_knows_nobody_sees_the_whole_swarm(network: Network) -> None:
    peer = network.add()
    assert await peer.dht.get_many([servers_of(MODEL, 0)], whole=True) == [[]]


@pytest.mark.slow
async def test_what_a_lossy_network_answers_whole_lacks_nobody(network: Network, server_body: MakeServer) -> None:
    first = network.add()
    peers = [first, *await network.add_joined(29)]
    for peer in peers:
        await peer.dht.put(sign_record(peer.identity, server_body()))
    everybody = {peer.peer_id for peer in peers}
    for network.loss in (0.3, 0.6, 0.9):
        whole = 0
        for peer in peers:
            try:
                found = await peer.dht.get(servers_of(MODEL, 0), whole=True)
            except PartialView:
                continue
            assert {record.peer_id for record in found} == everybody
            whole += 1
        assert whole > 0 or network.loss == 0.9

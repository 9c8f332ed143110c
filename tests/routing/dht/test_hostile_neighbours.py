"""Strangers with many keys and few addresses, which lie about addresses; and swarms that were split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from kademlia.node import Node

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity, PeerId, node_id_of
from peerd.protocol.records.envelope import ServerRecord, sign_record
from peerd.protocol.records.keys import server_key
from peerd.routing.dht.diversity import spread
from peerd.routing.dht.messages import FindNode, Found, Packet, Ping
from peerd.routing.dht.newcomers import MAX_WAITING
from peerd.routing.dht.record_sets import PartialView, servers_of
from peerd.routing.dht.table import Contact, ContactTable, PeerNode, load_contacts

Network = Any
MakeServer = Callable[..., ServerRecord]
MODEL = bytes(range(32))
EVIL = "93.184.216.0/24"
VICTIM = Multiaddr.parse("/ip4/93.184.216.99/tcp/80/ws")


def identity(number: int) -> Identity:
    return Identity.from_seed((10**6 + number).to_bytes(32, "big"))


def node(number: int, network: str = "") -> PeerNode:
    return PeerNode(Contact(identity(number).peer_id, (VICTIM,)), network)


# Addresses that were not checked.


async def test_what_a_stranger_says_of_its_addresses_is_passed_on_after_it_was_found_there(network: Network) -> None:
    peer, other = await network.add_joined(2)
    stranger = network.add()
    network.unseen.add((peer.peer_id, stranger.peer_id))
    await peer.dht.handle(stranger.peer_id, Packet(Ping(stranger.addresses).to_header()))
    question = Packet(FindNode(bytes(20), other.addresses).to_header())

    async def named() -> set[PeerId]:
        answer = Found.from_header((await peer.dht.handle(other.peer_id, question)).header)
        return {node.contact.peer_id for node in answer.nodes}

    assert stranger.peer_id not in await named()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.dht.meet_newcomers)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert stranger.peer_id in await named()


async def test_an_address_at_which_a_peer_is_not_never_travels_on(network: Network) -> None:
    """Not even together with a correct one: the whole swarm would dial it."""
    peer, _ = await network.add_joined(2)
    stranger = network.add()
    both = (*stranger.addresses, VICTIM)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.dht.meet_newcomers)
        await peer.dht.handle(stranger.peer_id, Packet(Ping(both).to_header()))
        await peer.dht.handle(identity(1).peer_id, Packet(Ping((VICTIM,)).to_header()))
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    known = {contact.peer_id: contact.addresses for contact in peer.dht.contacts}
    assert known[stranger.peer_id] == stranger.addresses
    assert identity(1).peer_id not in known


async def test_whoever_names_many_places_has_few_of_them_looked_at(network: Network) -> None:
    peer = network.add()
    for number in range(3000):
        await peer.dht.handle(identity(number).peer_id, Packet(Ping((VICTIM,)).to_header()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.dht.meet_newcomers)
        await trio.sleep(2)
        assert len(network.looked_for) <= 21
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert len(network.looked_for) == MAX_WAITING
    assert peer.dht.contacts == []


async def test_a_peer_that_names_itself_again_while_it_is_looked_for_costs_nothing(network: Network) -> None:
    peer, other = await network.add_joined(2)
    stranger = network.add()
    # Longer than the pause between two that are looked for.
    network.latency_s = (1.0, 1.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.dht.meet_newcomers)
        again = PeerNode(Contact(stranger.peer_id, (VICTIM,)))
        for _ in range(8):
            # As each answer to a question of ours does, with the same object.
            peer.dht._protocol.welcome_if_new(again)
            await trio.sleep(0.3)
        await trio.sleep(60)
        await peer.dht.handle(stranger.peer_id, Packet(Ping(stranger.addresses).to_header()))
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert stranger.peer_id in {contact.peer_id for contact in peer.dht.contacts}
    assert other.peer_id in {contact.peer_id for contact in peer.dht.contacts}


# Many keys, one network.


def test_of_one_network_two_count_and_more_only_where_others_do_not_suffice() -> None:
    crowd = [node(number, EVIL) for number in range(6)]
    others = [node(number, f"net {number}") for number in range(6, 10)]
    assert spread([*crowd, *others], 5) == [*crowd[:2], *others[:3]]
    assert spread([*crowd[:3], *others[:1], *crowd[3:]], 5) == [*crowd[:3], *others[:1], crowd[3]]
    neighbours = [node(number) for number in range(9)]
    assert spread(neighbours, 9) == neighbours


def test_a_crowd_from_one_network_fills_no_bucket_and_shows_none_but_two() -> None:
    table = ContactTable(Node(bytes(20)), 20, lambda: 0.0)
    for number in range(4000):
        table.add_contact(node(number, EVIL))
    honest = [node(number, f"net {number}") for number in range(4000, 4400)]
    for one in honest:
        table.add_contact(one)
    for target in honest[:50]:
        shown = table.find_neighbors(target)
        assert len(shown) == 20
        assert sum(one.network == EVIL for one in shown) <= 2


async def crowded(network: Network, key: bytes, crowd: int, swarm: int = 60) -> tuple[list[Any], list[Any]]:
    """Honest peers, each in a network of its own, and a crowd in one network that is nearer to a key."""
    peers = await network.add_joined(swarm)
    network.networks |= {peer.peer_id: f"honest {peer.peer_id}" for peer in peers}
    target = int.from_bytes(key, "big")

    def distance(peer_id: PeerId) -> int:
        return int.from_bytes(node_id_of(peer_id), "big") ^ target

    nearest = sorted(peers, key=lambda peer: distance(peer.peer_id))
    evil: list[Any] = []
    seed = 0
    while len(evil) < crowd:
        seed += 1
        one = Identity.from_seed(b"evil" + seed.to_bytes(28, "big"))
        if distance(one.peer_id) < distance(nearest[min(5, swarm - 1)].peer_id):
            evil.append(network.add_as(one))
    network.networks |= {one.peer_id: EVIL for one in evil}
    together = tuple(PeerNode(one.contact, EVIL) for one in evil[:20])

    def lie(packet: Packet) -> Packet:
        if packet.header["type"] == "store":
            return Packet({"type": "stored", "outcomes": ["stored"]})
        if packet.header["type"] == "ping":
            return Packet({"type": "pong"})
        return Packet(Found(together).to_header())

    network.liars |= {one.peer_id: lie for one in evil}
    for one in evil:
        for peer in peers:
            await peer.dht.handle(one.peer_id, Packet(Ping(one.addresses).to_header()))
    return peers, evil


async def test_ids_nearer_to_a_key_than_all_honest_peers_hide_nobody(network: Network, server_body: MakeServer) -> None:
    key = server_key(MODEL, 0)
    peers, evil = await crowded(network, key, 30)
    await peers[7].dht.put(sign_record(peers[7].identity, server_body()))
    holders = [peer for peer in peers if peer.store.get(key)]
    assert len(holders) >= 10
    for reader in (peers[3], peers[30], peers[59]):
        found = await reader.dht.get(servers_of(MODEL, 0), whole=True)
        assert {record.peer_id for record in found} == {peers[7].peer_id}
    assert evil


# Made-up contacts.


async def test_one_that_names_absent_peers_makes_no_view_partial(network: Network, server_body: MakeServer) -> None:
    peers = await network.add_joined(5)
    liar, reader = peers[0], peers[4]
    absent = tuple(node(number) for number in range(20))
    network.liars[liar.peer_id] = lambda _packet: Packet(Found(absent).to_header())
    await peers[1].dht.put(sign_record(peers[1].identity, server_body()))
    found = await reader.dht.get(servers_of(MODEL, 0), whole=True)
    assert [record.peer_id for record in found] == [peers[1].peer_id]


async def test_a_view_is_still_partial_where_those_whom_we_knew_are_silent(network: Network) -> None:
    peers = await network.add_joined(6)
    network.kill(*peers[:5])
    with pytest.raises(PartialView):
        await peers[5].dht.get(servers_of(MODEL, 0), whole=True)


async def test_one_on_the_internet_names_nobody_in_our_networks(network: Network) -> None:
    peers = await network.add_joined(5)
    liar, reader, victim = peers[0], peers[4], network.add()
    network.liars[liar.peer_id] = lambda packet: Packet(Found((PeerNode(victim.contact),)).to_header())
    protocol = reader.dht._protocol
    for is_public in (False, True):
        network.on_the_internet = {liar.peer_id} if is_public else set()
        reply = await protocol.call_find_node(PeerNode(liar.contact), PeerNode(victim.contact))
        assert [node.contact.addresses for node in reply.nodes] == [() if is_public else victim.addresses]


# Split swarms.


async def maintain(peers: list[Any], seconds: float) -> None:
    """Do what a daemon always does: refresh each minute, and look for lost parts every ten."""
    for minute in range(int(seconds // 60)):
        async with trio.open_nursery() as nursery:
            for number, peer in enumerate(peers):
                nursery.start_soon(peer.dht.refresh)
                if (minute + number) % 10 == 9:
                    nursery.start_soon(peer.dht.reunite)
        await trio.sleep(60)


def crossing(network: Network, peers: list[Any]) -> int:
    return sum(
        network.side(contact.peer_id) != network.side(peer.peer_id) for peer in peers for contact in peer.dht.contacts
    )


async def test_a_swarm_that_was_parted_becomes_one_again(network: Network, server_body: MakeServer) -> None:
    peers = await network.add_joined(16)
    one, other = peers[:8], peers[8:]
    ids = {peer.peer_id for peer in one}
    network.parted = ids
    await maintain(peers, 1500)
    assert crossing(network, peers) == 0
    network.parted = set()
    await maintain(peers, 1500)
    network.parted = ids
    assert crossing(network, peers) > 60
    network.parted = set()
    await one[0].dht.put(sign_record(one[0].identity, server_body(expires=1_800_000_000 + trio.current_time() + 300)))
    found = await other[5].dht.get(servers_of(MODEL, 0))
    assert [record.peer_id for record in found] == [one[0].peer_id]


async def test_whoever_was_lost_outlives_a_restart(network: Network) -> None:
    peers = await network.add_joined(4)
    network.kill(*peers[1:])
    for _ in range(2):
        await trio.sleep(1000)
        await peers[0].dht.refresh()
    assert peers[0].dht.contacts == []
    kept = {contact.peer_id for contact in load_contacts(peers[0].dht.dump())}
    assert {peer.peer_id for peer in peers[1:]} <= kept

"""Renewing a record with its holders: cheap, and correct again soon after changes among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

from peerd.protocol.identity import Identity, node_id_of
from peerd.protocol.records.envelope import ServerRecord, sign_record
from peerd.protocol.records.keys import server_key
from peerd.routing.dht.holders import LOOKUP_S
from peerd.routing.dht.messages import REPLICAS, Found, Packet
from peerd.routing.dht.record_sets import servers_of
from peerd.routing.dht.store import StoreLimits
from peerd.routing.dht.table import Contact, PeerNode

# Whole swarms, some of them with a hundred peers.
pytestmark = pytest.mark.slow

MakeServer = Callable[..., ServerRecord]
# Fixtures come from conftest.py, whose classes a test module cannot import.
Network = Any
Peer = Any

MODEL = bytes(range(32))
KEY = server_key(MODEL, 0)


def distance(peer: Peer) -> int:
    return int.from_bytes(node_id_of(peer.peer_id), "big") ^ int.from_bytes(KEY, "big")


def nearest(network: Network, count: int = REPLICAS) -> list[Peer]:
    alive = [peer for peer in network.peers.values() if peer.addresses and peer.peer_id not in network.dead]
    return sorted(alive, key=distance)[:count]


class Announcing:
    """A peer that announces one span, again and again."""

    def __init__(self, peer: Peer, server_body: MakeServer, now: Callable[[], float]) -> None:
        self.peer = peer
        self._body = server_body
        self._now = now
        self._seq = 0

    async def put(self) -> int:
        self._seq += 1
        body = self._body(seq=self._seq, expires=self._now() + 60)
        held: int = await self.peer.dht.put(sign_record(self.peer.identity, body))
        return held

    def is_current(self, holder: Peer) -> bool:
        return [record.body.seq for record in holder.store.get(KEY)] == [self._seq]


async def announcing(network: Network, server_body: MakeServer, now: Callable[[], float]) -> Announcing:
    """One of 60 peers, far from the key, whose record was put once."""
    peers = await network.add_joined(60)
    announcer = Announcing(max(peers, key=distance), server_body, now)
    assert await announcer.put() == REPLICAS
    return announcer


async def test_a_renewal_asks_hardly_more_than_the_holders(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    announcer = await announcing(network, server_body, unix_now)
    for _ in range(3):
        await trio.sleep(20)
        network.requests.clear()
        assert await announcer.put() == REPLICAS
        kinds = [kind for asker, _, kind in network.requests if asker == announcer.peer.peer_id]
        assert sorted(kinds) == ["find_node", *["store"] * REPLICAS]
        assert all(announcer.is_current(holder) for holder in nearest(network))


async def test_newcomers_that_stand_nearer_hold_it_after_two_renewals(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    announcer = await announcing(network, server_body, unix_now)
    before = nearest(network)
    await network.add_joined(60)
    now_nearest = nearest(network)
    assert len(set(map(distance, now_nearest)) - set(map(distance, before))) >= 3
    for _ in range(2):
        await trio.sleep(20)
        await announcer.put()
    assert sum(announcer.is_current(holder) for holder in now_nearest) >= REPLICAS - 1


async def test_holders_that_die_are_replaced_with_the_renewal_that_misses_them(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    announcer = await announcing(network, server_body, unix_now)
    network.kill(*nearest(network)[:8])
    await trio.sleep(20)
    assert await announcer.put() >= REPLICAS - 1
    assert sum(announcer.is_current(holder) for holder in nearest(network)) >= REPLICAS - 1


async def test_one_holder_that_dies_costs_no_lookup(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    announcer = await announcing(network, server_body, unix_now)
    network.kill(nearest(network)[5])
    await trio.sleep(20)
    network.requests.clear()
    assert await announcer.put() >= REPLICAS - 1
    assert sum(asker == announcer.peer.peer_id for asker, _, _ in network.requests) <= REPLICAS + 3


async def test_made_up_nearer_peers_take_the_record_from_no_holder(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    announcer = await announcing(network, server_body, unix_now)
    seeds = range(10**6, 10**6 + 500)
    contacts = [
        PeerNode(Contact(Identity.from_seed(n.to_bytes(32, "big")).peer_id, announcer.peer.addresses)) for n in seeds
    ]
    made_up = sorted(contacts, key=lambda node: node.long_id ^ int.from_bytes(KEY, "big"))[:REPLICAS]
    holders = nearest(network)
    assert made_up[-1].long_id ^ int.from_bytes(KEY, "big") < distance(holders[1])
    for liar in holders:
        dht = liar.dht

        def lie(packet: Packet, dht: Any = dht, peer_id: Any = announcer.peer.peer_id) -> Packet:
            if packet.header["type"] == "find_node":
                return Packet(Found(tuple(made_up)).to_header())
            answer: Packet = dht._protocol.answer(peer_id, packet, None)
            return answer

        network.liars[liar.peer_id] = lie
    for _ in range(3):
        await trio.sleep(20)
        assert await announcer.put() == REPLICAS
    assert all(announcer.is_current(holder) for holder in holders)


async def test_after_a_while_the_holders_are_looked_up_anew(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    announcer = await announcing(network, server_body, unix_now)
    await trio.sleep(LOOKUP_S)
    network.requests.clear()
    assert await announcer.put() == REPLICAS
    asked = [kind for asker, _, kind in network.requests if asker == announcer.peer.peer_id]
    assert asked.count("find_node") > 5


async def test_through_many_renewals_a_split_key_loses_no_live_peer_and_shows_no_gone_one(
    network: Network, server_body: MakeServer, unix_now: Callable[[], float]
) -> None:
    # Five times as many as one key holds: a thousand servers of one shard in small.
    network.limits = StoreLimits(records_a_key=6)
    network.loss = 0.01
    peers = await network.add_joined(30)

    async def renew(number: int) -> None:
        announcer = Announcing(peers[number], server_body, unix_now)
        await trio.sleep(20 * number / len(peers))
        while peers[number].peer_id not in network.dead:
            await announcer.put()
            await trio.sleep(20)

    async def found() -> set[str]:
        return {record.peer_id for record in await peers[-1].dht.get(servers_of(MODEL, 0))}

    async with trio.open_nursery() as nursery:
        for number in range(len(peers)):
            nursery.start_soon(renew, number)
        everybody = {peer.peer_id for peer in peers}
        await trio.sleep(30)
        for _ in range(3):
            assert await found() == everybody
            await trio.sleep(20)
        network.kill(*peers[:8])
        await trio.sleep(65)
        assert await found() == everybody - network.dead
        nursery.cancel_scope.cancel()

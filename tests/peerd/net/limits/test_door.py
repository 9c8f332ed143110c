"""Strangers at the door: how many may wait there, and for how long."""

from ipaddress import ip_address

import pytest
import trio

from peerd.net.connections import open_connections
from peerd.net.limits.gate import Gate
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectionLost
from peerd.protocol.identity import Identity
from peerd.testing.network import MemoryNetwork


def test_strangers_are_counted_in_all_and_by_public_address():
    gate = Gate(max_unproven=10, max_an_address=2)
    public, neighbour = ip_address("8.8.8.8"), ip_address("8.8.4.4")
    assert [gate.enter(public) for _ in range(3)] == [True, True, False]
    assert gate.enter(neighbour)
    gate.leave(public)
    assert gate.enter(public)
    assert [gate.enter(ip_address("127.0.0.1")) for _ in range(8)] == [True] * 7 + [False]


def test_one_host_has_a_whole_network_of_ipv6_addresses_and_counts_once():
    gate = Gate(max_an_address=2)
    addresses = [ip_address(f"2a00:1450:4001:81c::{n}") for n in range(1, 4)]
    assert [gate.enter(address) for address in addresses] == [True, True, False]
    assert gate.enter(ip_address("2a00:1450:4001:81d::1"))


async def test_silent_strangers_are_shown_the_door_after_ten_seconds_and_cannot_fill_it():
    network = MemoryNetwork()
    identity = Identity.from_seed(b"1" * 32)
    address = Multiaddr("ip4", "8.8.8.8", 1)
    async with open_connections(
        identity, transport=network.transport("8.8.8.8"), listen=[address], handlers={}
    ) as peer:
        strangers = [await network.transport("1.1.1.1").dial(address) for _ in range(20)]
        await trio.sleep(1)
        assert "unproven=8" in repr(peer)
        async with open_connections(
            Identity.from_seed(b"2" * 32), transport=network.transport("9.9.9.9"), handlers={}
        ) as other:
            await other.connect(peer.peer_id, [address])
            await trio.sleep(1)
            assert "unproven=8" in repr(peer)
        await trio.sleep(9)
        assert "unproven=0" in repr(peer)
        for stranger in strangers:
            with pytest.raises(ConnectionLost):
                await stranger.receive()

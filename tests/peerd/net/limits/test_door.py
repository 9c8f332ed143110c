"""Strangers at the door: how many may wait there, and for how long."""

from functools import partial
from ipaddress import ip_address

import pytest
import trio

from peerd.net.connections import open_connections
from peerd.net.limits.gate import MAX_UNPROVEN_A_NETWORK, Gate
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectionLost
from peerd.protocol.identity import Identity
from peerd.testing.network import MemoryNetwork


def _entered(gate, *addresses, on_replaced=lambda: None):
    """The visits from these addresses; None for each that is refused."""
    return [gate.enter(ip_address(address), on_replaced) for address in addresses]


def test_strangers_are_counted_in_all_and_by_public_address():
    gate = Gate(max_unproven=10, max_an_address=2)
    first, second, third = _entered(gate, *["8.8.8.8"] * 3)
    assert [visit is not None for visit in (first, second, third)] == [True, True, False]
    assert all(_entered(gate, "8.8.4.4"))
    first.leave()
    first.leave()
    assert all(_entered(gate, "8.8.8.8"))
    *fitting, last = _entered(gate, *["127.0.0.1"] * 8)
    assert all(fitting)
    assert last is None


@pytest.mark.parametrize("address", ["8.8.8.{}", "2600:1:2:{}::1"])
def test_the_addresses_of_one_network_share_its_places_at_the_door(address):
    """Whoever rents a machine gets 256 networks of the size that counts as one host."""
    gate = Gate()
    visits = _entered(gate, *(address.format(n) for n in range(64)))
    assert [visit is not None for visit in visits] == [True] * MAX_UNPROVEN_A_NETWORK + [False] * (
        64 - MAX_UNPROVEN_A_NETWORK
    )
    assert all(_entered(gate, "9.9.9.9", "2600:1:3::1"))


def test_a_newcomer_replaces_the_oldest_visit_of_the_network_with_most():
    gate = Gate(max_unproven=8)
    replaced = []
    for number, address in enumerate([*(f"8.8.8.{n}" for n in range(6)), "9.9.9.1", "9.9.9.2"]):
        gate.enter(ip_address(address), partial(replaced.append, number))
    assert all(_entered(gate, "1.1.1.1", "1.1.2.1"))
    assert replaced == [0, 1]
    assert all(_entered(gate, "9.9.9.3"))
    assert replaced == [0, 1, 2]
    # No network has two places more than these two now.
    assert _entered(gate, "9.9.9.4", "8.8.8.9") == [None, None]


def test_a_crowd_from_many_networks_is_not_replaced_by_one_more():
    gate = Gate(max_unproven=8)
    assert all(_entered(gate, *(f"8.8.{n}.1" for n in range(8))))
    assert _entered(gate, "9.9.9.9") == [None]


def test_one_host_has_a_whole_network_of_ipv6_addresses_and_counts_once():
    gate = Gate(max_an_address=2)
    visits = _entered(gate, *(f"2a00:1450:4001:81c::{n}" for n in range(1, 4)))
    assert [visit is not None for visit in visits] == [True, True, False]
    assert all(_entered(gate, "2a00:1450:4001:81d::1"))


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

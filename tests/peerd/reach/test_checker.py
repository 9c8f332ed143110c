"""Whether others can dial us, found out by real peers on a network in memory, with NATs."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.lowlevel

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL
from peerd.protocol.records.envelope import PeerRecord
from peerd.routing.reach.verdict import Reach
from tests.fakes.reach_fixture import (
    HOME,
    NAME,
    NEIGHBOUR,
    PORT,
    PUBLIC,
    ROUTER,
    hello_with,
    hosts,
    reach,
    server_record,
    until,
    world,
)


async def test_a_peer_behind_a_nat_finds_out_and_is_in_nobodys_table() -> None:
    async with world() as net:
        internet = await net.internet(3)
        peer = await net.at_home()
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        assert peer.reachability.found.value.wants_relays
        assert peer.discovery.dht.addresses == ()
        # Its neighbours may dial it; its address is announced to no other peer.
        assert hosts(peer.addresses) == [HOME]
        await trio.sleep(200)
        for other in internet:
            assert peer.peer_id not in {contact.peer_id for contact in other.discovery.dht.contacts}
        assert peer.discovery.dht.contacts


async def test_a_peer_behind_a_forwarded_port_announces_where_it_is_seen() -> None:
    async with world() as net:
        internet = await net.internet(3)
        net.network.forward(ROUTER, PORT, HOME)
        peer = await net.at_home()
        await until(reach(peer, Reach.PUBLIC), within_s=15)
        assert not peer.reachability.found.value.wants_relays
        assert [str(address) for address in peer.discovery.dht.addresses] == [f"/ip4/{ROUTER}/tcp/{PORT}/ws"]
        assert hosts(peer.addresses) == [ROUTER, HOME]
        await until(
            lambda: all(
                any(c.peer_id == peer.peer_id and hosts(c.addresses) == [ROUTER] for c in other.discovery.dht.contacts)
                for other in internet
            )
        )
        stranger = await net.open("5.9.9.9", listen=[])
        await stranger.connections.connect(peer.peer_id, peer.addresses[:1])


async def test_a_public_peer_is_reached_at_its_own_address() -> None:
    async with world() as net:
        internet = await net.internet(3)
        await until(reach(internet[2], Reach.PUBLIC), within_s=15)
        assert hosts(internet[2].addresses) == [PUBLIC[2]]
        # The first peer dialled no peer that it could ask; but it was dialled.
        assert internet[0].reachability.reach is Reach.PUBLIC
        assert hosts(internet[0].discovery.dht.addresses) == [PUBLIC[0]]


async def test_a_dial_to_an_address_that_is_not_ours_proves_nothing() -> None:
    async with world() as net:
        net.network.forward(ROUTER, PORT, HOME)
        peer = await net.at_home()
        stranger = await net.open("5.9.9.9", listen=[])
        await stranger.connections.connect(peer.peer_id, [Multiaddr("ip4", ROUTER, PORT)])
        await trio.sleep(5)
        assert peer.connections.live
        assert peer.reachability.reach is Reach.UNKNOWN


async def test_a_firewalled_address_is_announced_no_more() -> None:
    async with world() as net:
        await net.internet(2)
        net.network.put_behind_nat("6.6.6.7", "6.6.6.7")
        peer = await net.open("6.6.6.7")
        assert hosts(peer.discovery.dht.addresses) == ["6.6.6.7"]
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        assert peer.discovery.dht.addresses == ()
        assert peer.addresses == ()


@pytest.mark.parametrize("network", ["10.0.0", "127.0.0"])
async def test_a_swarm_in_a_private_range_stays_as_it_was(network: str) -> None:
    async with world() as net:
        first = await net.open(f"{network}.1")
        net.bootstrap = first.addresses
        second = await net.open(f"{network}.2")
        assert hosts(second.discovery.dht.addresses) == [f"{network}.2"]
        await until(reach(second, Reach.PUBLIC), within_s=15)
        assert hosts(second.discovery.dht.addresses) == [f"{network}.2"]
        assert hosts(second.addresses) == [f"{network}.2"]


@pytest.mark.parametrize("address", ["/dns4/peer.example.org/tcp/443/wss", "/ip4/10.9.9.9/tcp/443/ws"])
async def test_what_the_operator_announces_is_not_doubted(address: str) -> None:
    async with world() as net:
        await net.internet(2)
        peer = await net.at_home(announce=[address])
        await trio.sleep(100)
        assert peer.reachability.reach is Reach.PUBLIC
        assert [str(one) for one in peer.discovery.dht.addresses] == [address]
        assert [str(one.with_peer(None)) for one in peer.addresses] == [address]
        assert not [one for one in net.dialled if one[1].startswith(ROUTER)]


async def test_a_client_that_listens_nowhere_asks_nobody() -> None:
    async with world() as net:
        await net.internet(2)
        client = await net.open("5.9.9.9", listen=[])
        await trio.sleep(100)
        assert client.reachability.reach is Reach.UNKNOWN
        assert not [one for one in net.dialled if one[1].startswith("5.9.9.9")]


async def test_a_peer_on_loopback_only_is_told_that_nobody_can_dial_it() -> None:
    async with world() as net:
        await net.internet(2)
        peer = await net.at_home(listen=[f"/ip4/127.0.0.1/tcp/{PORT}/ws"])
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        assert "loopback only" in peer.reachability.here.why
        assert hosts(peer.addresses) == ["127.0.0.1"]
        assert peer.discovery.dht.addresses == ()


async def test_before_the_first_dial_back_a_peer_behind_a_nat_is_a_client() -> None:
    async with world() as net:
        first = await net.open(PUBLIC[0])
        del first.connections.handlers[DIALBACK_PROTOCOL]
        net.bootstrap = first.addresses
        peer = await net.at_home()
        await trio.sleep(60)
        assert peer.reachability.reach is Reach.UNKNOWN
        assert peer.discovery.dht.addresses == ()
        # No judge can tell; relays should make it reachable meanwhile.
        assert peer.reachability.found.value.wants_relays


async def test_a_peer_seen_by_proxies_only_is_a_client_and_wants_relays() -> None:
    async with world() as net:
        first = await net.open(PUBLIC[0])
        introduction = first.connections._introduction
        introduction.hello_to = partial(hello_with, introduction.hello_to, "127.0.0.1")
        net.bootstrap = first.addresses
        peer = await net.at_home()
        await trio.sleep(60)
        assert peer.reachability.here.observed == ()
        assert peer.discovery.dht.addresses == ()
        assert peer.reachability.found.value.wants_relays


async def test_that_a_swarm_is_on_the_internet_is_learnt_from_where_its_peers_are() -> None:
    async with world() as net:
        first = await net.open(PUBLIC[0])
        del first.connections.handlers[DIALBACK_PROTOCOL]
        net.bootstrap = (Multiaddr("dns4", NAME, PORT, peer_id=first.peer_id),)
        peer = await net.at_home()
        await trio.sleep(5)
        assert peer.discovery.dht.addresses == ()


async def test_neighbours_behind_one_nat_still_reach_each_other() -> None:
    async with world() as net:
        await net.internet(2)
        one, other = await net.at_home(), await net.at_home(NEIGHBOUR)
        for peer in (one, other):
            # They share their router's minute.
            await until(reach(peer, Reach.PRIVATE), within_s=2000)
        await other.connections.connect(one.peer_id, one.addresses)


async def test_a_private_peers_record_names_no_address_that_is_no_use() -> None:
    async with world() as net:
        internet = await net.internet(3)
        peer = await net.at_home()
        peer.discovery.announce_from(lambda: [server_record()])
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        await trio.sleep(10)
        record = await internet[1].discovery.directory.peer_record(peer.peer_id)
        assert record is not None
        body = PeerRecord.from_payload(record.payload)
        assert body.addresses == (f"/ip4/{HOME}/tcp/{PORT}/ws",)

"""Names in a next hop's record: the addresses to which they resolve decide, not the names."""

import pytest
import trio

from peerd.net.dial_policy import DialPolicy
from peerd.protocol.identity import Identity
from peerd.protocol.messages.session import LinkDown, NextHop
from peerd.protocol.records.envelope import PeerRecord, sign_record

RELAY = Identity.from_seed(b"r" * 32).peer_id


async def link_through_name(swarm, address, ip, relays=()):
    """What a client hears when its next hop's record has this address, and the name leads to `ip` (None: to it)."""
    host, after = await swarm.serve(0, 4), await swarm.serve(4, 8)
    swarm.network.names["next.example"] = ip or after.ip
    # As a daemon sets it: strangers' addresses lead into the ranges in which we listen, or to public ones.
    host.connections.strangers_policy = DialPolicy(lambda: host.connections.listen_addresses)
    client = await swarm.caller()
    await client.open(after, hop=1)
    record = sign_record(
        after.identity,
        PeerRecord(
            seq=1, expires=1_800_000_060 + trio.current_time(), addresses=(address,) if address else (), relays=relays
        ),
    )
    stream = await client.open(host, next=NextHop(client.ticket(host.identity.peer_id, after), record.encode()))
    with trio.move_on_after(5):
        return await client.hear(stream)
    return None


def dialled_by_the_hop(swarm):
    """The addresses that the first hop has dialled."""
    return {remote for local, remote in swarm.network.dialled if local == swarm.hosts[0].ip}


@pytest.mark.parametrize("address", ["/dns4/next.example/tcp/4000/ws", "/dns4/next.example/tcp/443/wss"])
async def test_a_name_that_leads_to_our_own_machine_is_not_dialled(open_swarm, address):
    async with open_swarm() as swarm:
        said = await link_through_name(swarm, address, "127.0.0.1")
        assert isinstance(said, LinkDown)
        assert dialled_by_the_hop(swarm) == set()


@pytest.mark.parametrize("relay", ["/dns4/next.example/tcp/4000/ws", "/ip4/127.0.0.1/tcp/4000/ws"])
async def test_a_relay_s_address_obeys_the_same_rules(open_swarm, relay):
    async with open_swarm() as swarm:
        said = await link_through_name(swarm, None, "127.0.0.1", relays=(f"{relay}/p2p/{RELAY}",))
        assert isinstance(said, LinkDown)
        assert dialled_by_the_hop(swarm) == set()


async def test_a_relay_s_name_that_leads_where_we_may_dial_is_dialled(open_swarm):
    async with open_swarm() as swarm:
        said = await link_through_name(swarm, None, None, relays=(f"/dns4/next.example/tcp/4000/ws/p2p/{RELAY}",))
        # The peer that answers there is not that relay.
        assert isinstance(said, LinkDown)
        assert dialled_by_the_hop(swarm) == {swarm.hosts[1].ip}


async def test_a_name_that_leads_nowhere_is_not_dialled(open_swarm):
    async with open_swarm() as swarm:
        said = await link_through_name(swarm, "/dns4/elsewhere.example/tcp/4000/ws", "127.0.0.1")
        assert isinstance(said, LinkDown)
        assert dialled_by_the_hop(swarm) == set()


async def test_a_name_that_leads_to_the_next_hop_is_dialled(open_swarm):
    async with open_swarm() as swarm:
        # Nothing is said: the link stands.
        assert await link_through_name(swarm, "/dns4/next.example/tcp/4000/ws", None) is None
        assert swarm.hosts[1].peer_id in swarm.hosts[0].connections.live

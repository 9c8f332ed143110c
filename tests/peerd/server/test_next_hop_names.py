"""Names in a next hop's record: the addresses to which they resolve decide, not the names."""

import socket

import pytest
import trio

from peerd.protocol.identity import Identity
from peerd.protocol.messages.session import LinkDown, NextHop
from peerd.protocol.records.envelope import PeerRecord, sign_record


class Resolver(trio.abc.HostnameResolver):
    """A resolver of one name."""

    def __init__(self, ip):
        self.ip = ip

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):
        await trio.lowlevel.checkpoint()
        if host not in ("next.example", b"next.example"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, type, proto, "", (self.ip, port))]

    async def getnameinfo(self, sockaddr, flags):
        raise socket.gaierror(socket.EAI_NONAME, "never asked")


RELAY = Identity.from_seed(b"r" * 32).peer_id


async def link_through_name(swarm, address, ip, relays=()):
    """What a client hears when its next hop's record has this address, and the name leads to `ip` (None: to it)."""
    host, after = await swarm.serve(0, 4), await swarm.serve(4, 8)
    trio.socket.set_custom_hostname_resolver(Resolver(ip or after.ip))
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


@pytest.mark.parametrize("address", ["/dns4/next.example/tcp/4000/ws", "/dns4/next.example/tcp/443/wss"])
async def test_a_name_that_leads_to_our_own_machine_is_not_dialled(open_swarm, address):
    async with open_swarm() as swarm:
        said = await link_through_name(swarm, address, "127.0.0.1")
        assert isinstance(said, LinkDown)
        assert "no address" in said.message


@pytest.mark.parametrize("relay", ["/dns4/next.example/tcp/4000/ws", "/ip4/127.0.0.1/tcp/4000/ws"])
async def test_a_relay_s_address_obeys_the_same_rules(open_swarm, relay):
    async with open_swarm() as swarm:
        said = await link_through_name(swarm, None, "127.0.0.1", relays=(f"{relay}/p2p/{RELAY}",))
        assert isinstance(said, LinkDown)
        assert "no address" in said.message


async def test_a_relay_s_name_that_leads_where_we_may_dial_is_dialled(open_swarm):
    async with open_swarm() as swarm:
        said = await link_through_name(swarm, None, None, relays=(f"/dns4/next.example/tcp/4000/ws/p2p/{RELAY}",))
        # The peer that answers there is not that relay, which shows that it was dialled.
        assert isinstance(said, LinkDown)
        assert f"{swarm.hosts[1].ip}/tcp/4000/ws/p2p/{RELAY}/p2p-circuit/p2p/{swarm.hosts[1].peer_id}" in said.message


async def test_a_name_that_leads_nowhere_is_not_dialled(open_swarm):
    async with open_swarm() as swarm:
        said = await link_through_name(swarm, "/dns4/elsewhere.example/tcp/4000/ws", "127.0.0.1")
        assert isinstance(said, LinkDown)


async def test_a_name_that_leads_to_the_next_hop_is_dialled(open_swarm):
    async with open_swarm() as swarm:
        # Nothing is said: the link stands.
        assert await link_through_name(swarm, "/dns4/next.example/tcp/4000/ws", None) is None
        assert swarm.hosts[1].peer_id in swarm.hosts[0].connections.live

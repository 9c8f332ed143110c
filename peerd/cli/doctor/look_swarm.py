"""Asks the bootstrap peers: do they answer, how fast, what time is it there, and can they dial this machine?

The doctor joins no DHT and announces nothing. It uses a key made for this run, so it disturbs no daemon that runs with
the real one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import trio

from peerd.cli.doctor.facts import BootstrapFact, DialFact, SwarmFact
from peerd.net.connections import Connections, PeerConnection, open_connections
from peerd.net.limits.owners import network_of
from peerd.net.transport import Transport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import Identity
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL, Dialled
from peerd.reach.dialback import ask_to_be_dialled
from peerd.routing.reach.verdict import ports_for
from peerd.trio_tools import at_once

# A dial sets no deadline beyond 6 s an address; a peer behind a relay takes two dials.
CONNECT_S = 15.0
# How many peers are asked to dial back: as many as settle a disagreement.
MAX_ASKED = 3


async def look_at_swarm(
    transport: Transport,
    bootstrap: Sequence[Multiaddr],
    listen: Sequence[Multiaddr],
    *,
    swarm_key: bytes | None = None,
    may_be_relayed: bool = True,
    now: Callable[[], float] = time.time,
) -> SwarmFact:
    """What the bootstrap peers show. Takes at most about 40 s, if they are silent."""
    opening = open_connections(
        Identity.generate(),
        transport=transport,
        listen=listen,
        handlers={},
        swarm_key=swarm_key,
        may_be_relayed=may_be_relayed,
        now=now,
    )
    try:
        async with opening as connections:
            first = {address.peer_id: address for address in reversed(bootstrap)}
            looks = [
                partial(_meet, connections, address, now)
                if first[address.peer_id] == address
                else partial(_find, connections, address)
                for address in bootstrap
            ]
            met = await at_once(looks)
            peers = [peer for peer, _ in met if peer is not None]
            dialled = await _ask_to_dial(connections, peers)
            return SwarmFact(tuple(fact for _, fact in met), dialled, may_be_relayed)
    except OSError as error:
        wanted = ", ".join(map(str, listen))
        return SwarmFact(problem=f"cannot listen on {wanted}: {error.strerror or error}")


async def _meet(
    connections: Connections, address: Multiaddr, now: Callable[[], float]
) -> tuple[PeerConnection | None, BootstrapFact]:
    """Connect to one bootstrap peer, and look at its clock and its delay."""
    try:
        with trio.fail_after(CONNECT_S):
            connection = await connections.connect(address.peer_id, [address])
            hello = await connection.wait_hello()
            arrived = now()
            rtt_s = await connection.measure()
    except trio.TooSlowError:
        return None, BootstrapFact(address, f"not within {CONNECT_S:g} s")
    except PeerdError as error:
        # The finding names the address already.
        return None, BootstrapFact(address, str(error).rpartition(f"{address}: ")[2])
    return connection, BootstrapFact(
        address,
        rtt_s=rtt_s,
        relay="" if connection.relay is None else str(connection.relay.peer_id),
        # It wrote the hello half a round trip before it arrived.
        ahead_s=hello.time_us / 1e6 + rtt_s / 2 - arrived,
        network=network_of(connection.accountable_ip),
    )


async def _find(connections: Connections, address: Multiaddr) -> tuple[None, BootstrapFact]:
    """Try one more address of a peer, to which there is one connection at most."""
    assert address.peer_id is not None
    found = await connections.find(address.peer_id, address, connections.own_policy)
    return None, BootstrapFact(address, "" if found else "this peer is not there")


async def _ask_to_dial(connections: Connections, peers: Sequence[PeerConnection]) -> DialFact:
    """Have peers dial us at the port where we listen, as they would a daemon."""
    asked = [(peer, _ports(connections, peer)) for peer in peers]
    wanted = [(peer, ports) for peer, ports in asked if ports][:MAX_ASKED]
    answers = await at_once([partial(_ask_one, peer, ports) for peer, ports in wanted])
    return DialFact(
        wanted[0][1] if wanted else (),
        tuple(answer for answer in answers if isinstance(answer, Dialled)),
        tuple(answer for answer in answers if isinstance(answer, str)),
    )


def _ports(connections: Connections, peer: PeerConnection) -> tuple[int, ...]:
    """The ports that a peer may be asked to dial: none if it dials nobody, or does not see where we are."""
    hello = peer.hello
    if hello is None or hello.seen_at is None or peer.relay is not None or DIALBACK_PROTOCOL not in hello.protocols:
        return ()
    return ports_for(hello.seen_at, connections.listen_addresses)


async def _ask_one(peer: PeerConnection, ports: Sequence[int]) -> Dialled | str:
    try:
        return await ask_to_be_dialled(peer, ports)
    except PeerdError as error:
        return str(error)

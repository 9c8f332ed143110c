"""A program: one peer of a small swarm that has a relay, for tests in which each peer runs on a host of its own.

It prints one JSON object a line, and ends when its standard input is closed.

    punching_peer.py relay
    punching_peer.py reserved RELAY...
    punching_peer.py caller COUNT PEER RELAY...   calls PEER as COUNT peers
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import trio

from peerd.net.connections import Connections, open_connections
from peerd.net.stream import Stream
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity, PeerId
from peerd.reach.reachability import open_reach
from peerd.reach.relay_ledger import RelayLimits
from peerd.reach.reservations import open_reservations
from peerd.routing.dht.table import Contact

PORT = 31330
LISTEN = Multiaddr("ip4", "0.0.0.0", PORT)
# Longer than two peers try to meet.
TRIES_S = 6.0
ROUND_TRIPS = 10
AT_ONCE = 6


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


@asynccontextmanager
async def opened(
    relays: Sequence[Multiaddr], *, listen: bool = True, relay: RelayLimits | None = None
) -> AsyncIterator[Connections]:
    """A peer that is connected to the relays."""
    transport = WebSocketTransport()
    opening = open_connections(
        Identity.generate(), transport=transport, listen=[LISTEN] if listen else [], handlers={"/echo/1": echo}
    )
    async with (
        opening as connections,
        open_reach(connections, transport, bootstrap=relays, relay=relay, now=time.time),
    ):
        for address in relays:
            await connections.connect(address.peer_id, [address])
        yield connections


async def echo(stream: Stream) -> None:
    while True:
        message = await stream.receive()
        await stream.send(message.header)


async def reserve(relays: Sequence[Multiaddr]) -> None:
    contacts = [Contact(address.peer_id, (address,)) for address in relays if address.peer_id is not None]
    async with opened(relays) as connections:
        ready = trio.Event()
        holding = open_reservations(connections, lambda: contacts, lambda _: ready.set(), Random(0), wanted=True)
        async with holding:
            await ready.wait()
            say(peer_id=str(connections.peer_id))
            await until_closed()


async def call(count: int, peer_id: PeerId, relays: Sequence[Multiaddr]) -> None:
    """Call a peer as `count` peers: the first listens, as a server does, the others do not."""
    await call_once(peer_id, relays, trio.CapacityLimiter(1), listen=True)
    limiter = trio.CapacityLimiter(AT_ONCE)
    async with trio.open_nursery() as nursery:
        for _ in range(count - 1):
            nursery.start_soon(call_once, peer_id, relays, limiter)


async def call_once(
    peer_id: PeerId, relays: Sequence[Multiaddr], limiter: trio.CapacityLimiter, listen: bool = False
) -> None:
    async with limiter, opened(relays, listen=listen) as connections:
        ways = [replace(relay, relay=relay.peer_id, peer_id=peer_id) for relay in relays]
        relayed = await connections.connect(peer_id, ways)
        relayed_s = await round_trip_s(connections, peer_id)
        started = trio.current_time()
        with trio.move_on_after(TRIES_S):
            while connections.live[peer_id] is relayed:
                await trio.sleep(0.01)
        took_s = trio.current_time() - started
        way = connections.live[peer_id].way
        say(way=way, relayed_s=relayed_s, took_s=took_s, now_s=await round_trip_s(connections, peer_id))


async def round_trip_s(connections: Connections, peer_id: PeerId) -> float:
    """The shortest of a few round trips of a small message."""
    best = float("inf")
    async with await connections.open_stream(peer_id, "/echo/1") as stream:
        for number in range(ROUND_TRIPS):
            started = trio.current_time()
            await stream.send({"n": number})
            await stream.receive()
            best = min(best, trio.current_time() - started)
    return best


async def until_closed() -> None:
    """Wait until standard input is closed."""
    await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


async def main(role: str = "", *arguments: str) -> None:
    if role == "relay":
        async with opened([], relay=RelayLimits()) as connections:
            say(peer_id=str(connections.peer_id))
            await until_closed()
    elif role == "reserved":
        await reserve([Multiaddr.parse(text) for text in arguments])
    else:
        count, peer_id, *relays = arguments
        await call(int(count), PeerId(peer_id), [Multiaddr.parse(text) for text in relays])


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])

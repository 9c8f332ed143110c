"""Measures one connection between two processes on loopback: round trips without and beside bulk, and bulk alone.

It measures a direct connection first, then one through a relay, which is a process of its own with limits too high to
matter.

    python -m benchmarks.costs.connection_bench

Prints two tables. The figures depend on the machine. Their ratios show whether priorities work, and what a relay costs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from statistics import quantiles

import trio

from peerd.net.connections import Connections, PeerConnection, Stream, open_connections
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import Priority
from peerd.protocol.identity import Identity
from peerd.protocol.messages.relay import RELAY_PROTOCOL, RELAY_ROLE
from peerd.reach.relay import Relay
from peerd.reach.relay_ledger import RelayLimits
from peerd.reach.reservations import open_reservations
from peerd.routing.dht.table import Contact

LISTEN = Multiaddr.parse("/ip4/127.0.0.1/tcp/0/ws")
ECHO, DRAIN, FLOOD = "/bench/echo/1", "/bench/drain/1", "/bench/flood/1"
MIB = 1024 * 1024
SMALL_BYTES = 2048
BULK_BYTES = 4 * MIB
WARM_UP, ROUND_TRIPS = 200, 2000
BULK_MESSAGES = 64


async def echo(stream: Stream) -> None:
    """Answer every message with its own body, at the priority of decoding."""
    while True:
        message = await stream.receive(SMALL_BYTES)
        stream.send_nowait(message.header, [message.body], priority=Priority.DECODE)


async def drain(stream: Stream) -> None:
    """Receive messages until the last, then confirm."""
    while True:
        message = await stream.receive(BULK_BYTES)
        if message.header.get("last"):
            await stream.send({"done": True})


async def flood(stream: Stream) -> None:
    """Send bulk until the stream is reset."""
    body = bytes(BULK_BYTES)
    while True:
        await stream.send({}, [body], priority=Priority.BULK)


HANDLERS = {ECHO: echo, DRAIN: drain, FLOOD: flood}


async def serve() -> None:
    async with open_connections(
        Identity.generate(), transport=WebSocketTransport(), listen=[LISTEN], handlers=HANDLERS
    ) as connections:
        print(connections.listen_addresses[0], flush=True)
        await trio.sleep_forever()


async def relay() -> None:
    identity = Identity.generate()
    service = Relay(identity.peer_id, RelayLimits(bytes_a_second=2**34, total_bytes_a_second=2**34))
    async with open_connections(
        identity,
        transport=WebSocketTransport(),
        listen=[LISTEN],
        handlers={RELAY_PROTOCOL: service.answer},
        roles=[RELAY_ROLE],
    ) as connections:
        connections.present_as(listen_as=connections.listen_addresses)
        print(connections.listen_addresses[0].with_peer(identity.peer_id), flush=True)
        await trio.sleep_forever()


async def serve_behind(address: Multiaddr) -> None:
    identity = Identity.generate()

    def held(relays: tuple[Multiaddr, ...]) -> None:
        print(replace(relays[0], relay=relays[0].peer_id, peer_id=identity.peer_id), flush=True)

    assert address.peer_id is not None
    contacts = [Contact(address.peer_id, (address,))]
    async with (
        open_connections(identity, transport=WebSocketTransport(), handlers=HANDLERS) as connections,
        open_reservations(connections, lambda: contacts, held, Random(0), wanted=True),
    ):
        await trio.sleep_forever()


async def round_trips(connection: PeerConnection, count: int) -> list[float]:
    """Return the milliseconds of each round trip, from `send` to the answer."""
    body = bytes(SMALL_BYTES)
    times = []
    async with connection.open_stream(ECHO, priority=Priority.DECODE) as stream:
        for _ in range(count):
            start = trio.current_time()
            await stream.send({}, [body])
            await stream.receive(SMALL_BYTES)
            times.append((trio.current_time() - start) * 1000)
    return times


async def send_bulk(connection: PeerConnection, messages: int) -> None:
    body = bytes(BULK_BYTES)
    async with connection.open_stream(DRAIN, priority=Priority.BULK) as stream:
        for index in range(messages):
            await stream.send({"last": index == messages - 1}, [body])
        await stream.receive()


async def receive_bulk(connection: PeerConnection, messages: int) -> None:
    async with connection.open_stream(FLOOD, priority=Priority.BULK) as stream:
        for _ in range(messages):
            await stream.receive(BULK_BYTES)


async def bulk_rate(connection: PeerConnection) -> float:
    start = trio.current_time()
    await send_bulk(connection, BULK_MESSAGES)
    return BULK_MESSAGES * BULK_BYTES / MIB / (trio.current_time() - start)


async def beside(connection: PeerConnection, *, both_ways: bool) -> list[float]:
    """Measure round trips while 4 MiB messages are sent without pause, and with `both_ways` received too."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_bulk, connection, sys.maxsize)
        if both_ways:
            nursery.start_soon(receive_bulk, connection, sys.maxsize)
        await trio.sleep(0.5)
        times = await round_trips(connection, ROUND_TRIPS // 4)
        nursery.cancel_scope.cancel()
    return times


async def measure(connections: Connections, address: Multiaddr) -> None:
    connection = await connections.connect(None, [address])
    await round_trips(connection, WARM_UP)
    print(f"{'':44} {'p50':>8} {'p99':>8}")
    for name, times in (
        ("2 KiB round trip, idle", await round_trips(connection, ROUND_TRIPS)),
        ("  beside 4 MiB messages one way", await beside(connection, both_ways=False)),
        ("  beside 4 MiB messages both ways", await beside(connection, both_ways=True)),
    ):
        cuts = quantiles(times, n=100)
        print(f"{name:44} {cuts[49]:5.2f} ms {cuts[98]:5.2f} ms")
    print(f"{'bulk, one way, 4 MiB messages':44} {await bulk_rate(connection):5.0f} MiB/s")


async def measure_all(address: Multiaddr) -> None:
    async with open_connections(Identity.generate(), transport=WebSocketTransport(), handlers={}) as connections:
        await measure(connections, address)


@contextmanager
def another(*arguments: str) -> Iterator[Multiaddr]:
    """Run this program in a process of its own, and yield the address that it prints."""
    command = [sys.executable, "-m", "benchmarks.costs.connection_bench", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Multiaddr.parse(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()


def main() -> None:
    print("a direct connection")
    with another("serve") as address:
        trio.run(measure_all, address)
    print("\nthrough a relay")
    with another("relay") as between, another("behind", str(between)) as address:
        trio.run(measure_all, address)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            trio.run(serve)
        case ["relay"]:
            trio.run(relay)
        case ["behind", where]:
            trio.run(serve_behind, Multiaddr.parse(where))
        case _:
            main()

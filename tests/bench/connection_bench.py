"""What one connection does between two processes on loopback: round trips, alone and beside bulk, and bulk alone.

    python tests/bench/connection_bench.py

Prints a table. The figures depend on the machine; their ratios say whether priorities work.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import quantiles

import trio

from peerd.connections import Connections, PeerConnection, Stream, open_connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.frames import Priority
from peerd.protocol.identity import Identity
from peerd.websocket import WebSocketTransport

LISTEN = Multiaddr.parse("/ip4/127.0.0.1/tcp/0/ws")
ECHO, DRAIN, FLOOD = "/bench/echo/1", "/bench/drain/1", "/bench/flood/1"
MIB = 1024 * 1024
SMALL_BYTES = 2048
BULK_BYTES = 4 * MIB
WARM_UP, ROUND_TRIPS = 200, 2000
BULK_MESSAGES = 64


async def echo(stream: Stream) -> None:
    """Answer every message with its own body, as urgently as it came."""
    while True:
        message = await stream.receive()
        stream.send_nowait(message.header, [message.body], priority=Priority.DECODE)


async def drain(stream: Stream) -> None:
    """Take messages and count them."""
    while True:
        message = await stream.receive(BULK_BYTES)
        if message.header.get("last"):
            await stream.send({"done": True})


async def flood(stream: Stream) -> None:
    """Send bulk until the stream is reset."""
    body = bytes(BULK_BYTES)
    while True:
        await stream.send({}, [body], priority=Priority.BULK)


async def serve() -> None:
    handlers = {ECHO: echo, DRAIN: drain, FLOOD: flood}
    async with open_connections(
        Identity.generate(), transport=WebSocketTransport(), listen=[LISTEN], handlers=handlers
    ) as connections:
        print(connections.listen_addresses[0], flush=True)
        await trio.sleep_forever()


async def round_trips(connection: PeerConnection, count: int) -> list[float]:
    """Milliseconds from `send` to the answer, of each."""
    body = bytes(SMALL_BYTES)
    times = []
    async with connection.open_stream(ECHO, priority=Priority.DECODE) as stream:
        for _ in range(count):
            start = trio.current_time()
            await stream.send({}, [body])
            await stream.receive()
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
    """Round trips while 4 MiB messages are sent, and if wanted received, all the time."""
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


def main() -> None:
    server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        trio.run(measure_all, Multiaddr.parse(server.stdout.readline().strip()))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        trio.run(serve)
    else:
        main()

"""The delaying proxy's accuracy, to the microsecond under a mock clock, and once between real sockets."""

from __future__ import annotations

import pytest
import trio
from trio.testing import memory_stream_pair

import peerd
from benchmarks.swarms.delayed_link import (
    BACKLOG_BYTES,
    CHUNK_BYTES,
    READ_AHEAD_S,
    Line,
    Quality,
    free_port,
    open_delayed_link,
    pump,
)
from peerd.net.dial_policy import ANYWHERE

DELAY_S = 0.05
MBIT = 1e6


class Path:
    """One direction of a link: what goes in at `entry` comes out at `exit`."""

    def __init__(self, line: Line) -> None:
        self.entry, self._in = memory_stream_pair()
        self._out, self.exit = memory_stream_pair()
        self._line = line

    async def run(self) -> None:
        await pump(self._in, self._out, self._line)

    async def receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            data = await self.exit.receive_some()
            assert data, "the stream ended early"
            received += data
        return bytes(received)


@pytest.fixture
def now():
    return trio.current_time


async def test_a_message_arrives_one_delay_and_its_own_length_later(now):
    line = Line(Quality(DELAY_S, 8 * MBIT))
    path = Path(line)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.run)
        for _ in range(3):
            began = now()
            await path.entry.send_all(b"x" * 1000)
            await path.receive(1000)
            assert now() - began == pytest.approx(DELAY_S + 0.001, abs=1e-6)
        assert (line.passed.bytes, line.passed.mean_s) == (3000, pytest.approx(DELAY_S + 0.001, abs=1e-6))
        nursery.cancel_scope.cancel()


async def test_messages_under_way_do_not_wait_for_each_others_delay(now):
    path = Path(Line(Quality(DELAY_S)))
    arrivals = []
    began = now()

    async def send() -> None:
        for number in range(20):
            await path.entry.send_all(bytes([number]) * 100)
            await trio.sleep(0.002)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.run)
        nursery.start_soon(send)
        for number in range(20):
            assert await path.receive(100) == bytes([number]) * 100
            arrivals.append(now() - began - 0.002 * number)
        nursery.cancel_scope.cancel()
    assert arrivals == pytest.approx([DELAY_S] * 20, abs=1e-6)


@pytest.mark.parametrize("delay_s", [0.0, DELAY_S, 1.0])
async def test_bulk_takes_the_time_of_its_rate_whatever_the_delay(now, delay_s: float):
    path = Path(Line(Quality(delay_s, 100 * MBIT)))
    size = 3_000_000
    began = now()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.run)
        nursery.start_soon(path.entry.send_all, bytes(size))
        await path.receive(size)
        nursery.cancel_scope.cancel()
    assert now() - began == pytest.approx(delay_s + size * 8 / (100 * MBIT), rel=1e-6)


async def test_connections_share_a_line(now):
    line = Line(Quality(DELAY_S, 8 * MBIT))
    paths = [Path(line) for _ in range(2)]
    size = 500_000
    began = now()
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as transfers:
            for path in paths:
                nursery.start_soon(path.run)
                transfers.start_soon(path.entry.send_all, bytes(size))
                transfers.start_soon(path.receive, size)
        nursery.cancel_scope.cancel()
    assert now() - began == pytest.approx(DELAY_S + 1.0, rel=1e-6)


async def test_an_idle_line_saves_up_nothing(now):
    path = Path(Line(Quality(0.0, 8 * MBIT)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.run)
        await trio.sleep(10)
        began = now()
        nursery.start_soon(path.entry.send_all, bytes(100_000))
        await path.receive(100_000)
        assert now() - began == pytest.approx(0.1, rel=1e-6)
        nursery.cancel_scope.cancel()


async def test_the_end_arrives_after_the_last_byte_and_leaves_the_other_direction_open(now):
    path = Path(Line(Quality(DELAY_S)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.run)
        await path.entry.send_all(b"last")
        await path.entry.send_eof()
        assert await path.receive(4) == b"last"
        assert await path.exit.receive_some() == b""
        assert now() == pytest.approx(DELAY_S, abs=1e-6)


class Endless(trio.abc.ReceiveStream):
    """Always has more to read, and counts what was read."""

    taken = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        self.taken += max_bytes
        return bytes(max_bytes)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Blocked(trio.abc.HalfCloseableStream):
    """Never takes anything."""

    async def send_all(self, data: bytes) -> None:
        await trio.sleep_forever()

    wait_send_all_might_not_block = send_eof = receive_some = aclose = send_all


async def test_a_receiver_that_does_not_read_stops_the_sender():
    source, rate = Endless(), 100 * MBIT
    with trio.move_on_after(60):
        await pump(source, Blocked(), Line(Quality(DELAY_S, rate)))
    under_way = rate / 8 * (DELAY_S + READ_AHEAD_S)
    assert BACKLOG_BYTES < source.taken <= BACKLOG_BYTES + under_way + 4 * CHUNK_BYTES


@pytest.mark.real_time
async def test_a_peer_that_announces_the_proxy_is_reached_through_it():
    """Through real sockets: what a peer answers takes a round trip of the link, though it is next door."""
    port = free_port()
    async with open_delayed_link(port, Quality(DELAY_S, 100 * MBIT)) as link:
        address = f"/ip4/127.0.0.1/tcp/{link.port}/ws"
        async with (
            peerd.open_peer(listen=[f"/ip4/127.0.0.1/tcp/{port}/ws"], announce=[address]) as far,
            peerd.open_peer() as near,
        ):
            (announced,) = far.addresses
            assert announced.port == link.port
            began = trio.current_time()
            await near.connections.connect(announced.peer_id, [announced], ANYWHERE)
            took_s = trio.current_time() - began
    # TCP's own handshake ends at the proxy; the upgrade and Noise are two round trips at least.
    assert 4 * DELAY_S <= took_s < 4 * DELAY_S + 1.0


@pytest.mark.real_time
async def test_hanging_up_ends_the_other_side_too():
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ended = trio.Event()

        async def handle(stream: trio.SocketStream) -> None:
            assert await stream.receive_some(10) == b"hello"
            assert await stream.receive_some(10) == b""
            ended.set()

        nursery.start_soon(trio.serve_listeners, handle, listeners)
        async with open_delayed_link(listeners[0].socket.getsockname()[1], Quality(0.01)) as link:
            stream = await trio.open_tcp_stream("127.0.0.1", link.port)
            await stream.send_all(b"hello")
            await stream.aclose()
            with trio.fail_after(5):
                await ended.wait()
        nursery.cancel_scope.cancel()

"""Known ways in which one socket for everything fails: each is reproduced, and prevented from coming back.

Messages cross a slow line (in memory, so that time costs nothing) or a real socket whose buffers fill.
"""

from contextlib import asynccontextmanager

import pytest
import trio

from peerd.net.connections import open_connections
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import StreamReset
from peerd.protocol.identity import Identity
from peerd.testing.network import MemoryNetwork

MIB = 1 << 20
# 100 Mbit/s: a 16 KiB frame takes 1.3 ms, 4 MiB take a third of a second.
LINE_BYTES_A_SECOND = 12_500_000
HERE, THERE = Identity.from_seed(b"1" * 32), Identity.from_seed(b"2" * 32)


async def _echo(stream):
    while True:
        try:
            message = await stream.receive(64 * MIB)
        except trio.EndOfChannel:
            return
        await stream.send(message.header, [message.body], priority=Priority(message.header.get("priority", 0)))


async def _drain(stream):
    while True:
        try:
            await stream.receive(64 * MIB)
        except trio.EndOfChannel:
            return


async def _hold(_stream):
    await trio.sleep_forever()


HANDLERS = {"/echo/1": _echo, "/drain/1": _drain, "/hold/1": _hold}


@asynccontextmanager
async def _joined(one_transport, other_transport, listen, host):
    async with (
        open_connections(THERE, transport=other_transport, listen=[listen], handlers=HANDLERS) as other,
        open_connections(HERE, transport=one_transport, handlers=HANDLERS) as one,
    ):
        port = other.listen_addresses[0].port
        connection = await one.connect(other.peer_id, [Multiaddr("ip4", host, port)])
        await connection.wait_hello()
        yield connection, other.live[one.peer_id], other


@asynccontextmanager
async def _slow_line(bytes_a_second=LINE_BYTES_A_SECOND, latency_s=0.0):
    network = MemoryNetwork(latency_s=latency_s, bytes_a_second=bytes_a_second)
    listen = Multiaddr.parse("/ip4/0.0.0.0/tcp/1/ws")
    async with _joined(network.transport("10.0.0.1"), network.transport("10.0.0.2"), listen, "10.0.0.2") as joined:
        yield joined


@asynccontextmanager
async def _real_socket():
    listen = Multiaddr.parse("/ip4/127.0.0.1/tcp/0/ws")
    async with _joined(WebSocketTransport(), WebSocketTransport(), listen, "127.0.0.1") as joined:
        yield joined


async def _round_trip(stream, priority=Priority.DECODE):
    start = trio.current_time()
    await stream.send({"priority": priority}, [bytes(2048)], priority=priority)
    assert len((await stream.receive(2**20)).body) == 2048
    return trio.current_time() - start


async def test_cancelling_a_request_in_mid_send_breaks_nothing_but_its_stream():
    async with _slow_line() as (connection, _, _):
        with trio.move_on_after(0.05) as cancelled:
            async with connection.open_stream("/echo/1") as doomed:
                await doomed.send({}, [bytes(4 * MIB)], priority=Priority.BULK)
                await doomed.receive(4 * MIB)
        assert cancelled.cancelled_caught
        async with connection.open_stream("/echo/1") as stream:
            assert await _round_trip(stream) < 0.01
        assert connection.lost is None


@pytest.mark.real_time
async def test_cancelling_requests_at_any_moment_leaves_a_real_socket_whole():
    async with _real_socket() as (connection, _, _):
        for milliseconds in range(0, 20, 2):
            with trio.move_on_after(milliseconds / 1000):
                async with connection.open_stream("/echo/1") as doomed:
                    await doomed.send({}, [bytes(4 * MIB)], priority=Priority.BULK)
                    await doomed.receive(4 * MIB)
        async with connection.open_stream("/echo/1") as stream:
            await _round_trip(stream)
        assert connection.lost is None


async def test_a_cancelled_send_has_queued_nothing():
    async with _slow_line(bytes_a_second=1000.0) as (connection, _, _):
        stream = connection.open_stream("/drain/1")
        await stream.send({}, [bytes(MIB)])
        with trio.move_on_after(1) as waited:
            await stream.send({}, [b"x"])
        with trio.CancelScope() as before:
            before.cancel()
            await connection.open_stream("/drain/1").send({}, [b"y"])
        assert waited.cancelled_caught
        assert before.cancelled_caught
        assert stream.unsent_messages == 1


async def test_a_cancelled_receive_has_lost_nothing():
    async with _slow_line() as (connection, _, _):
        async with connection.open_stream("/echo/1") as stream:
            for number in range(20):
                stream.send_nowait({"n": number}, [bytes(100_000)], priority=Priority.BULK)
            received = []
            while len(received) < 20:
                with trio.move_on_after(0.003):
                    received.append((await stream.receive(2**20)).header["n"])
        assert received == list(range(20))


@pytest.mark.real_time
@pytest.mark.parametrize("attempt", range(8))
async def test_crossing_bulk_sends_do_not_deadlock(attempt):
    async with _real_socket() as (one, other, _):
        async with trio.open_nursery() as nursery:
            for connection in (one, other):
                for _ in range(2):
                    nursery.start_soon(_send_and_finish, connection, 4 * MIB + attempt)
        assert one.lost is other.lost is None


async def _send_and_finish(connection, size):
    async with connection.open_stream("/drain/1", priority=Priority.BULK) as stream:
        await stream.send({}, [bytes(size)])
        await stream.wait_unsent_below(1)


async def test_peers_that_both_send_bulk_without_reading_any_still_answer_pings():
    async with _slow_line() as (one, other, _):
        for connection in (one, other):
            for _ in range(8):
                connection.open_stream("/hold/1").send_nowait({}, [bytes(16 * MIB)], priority=Priority.BULK)
        await trio.sleep(120)
        assert one.lost is other.lost is None
        assert one.rtt_s < 0.01


async def test_a_peer_whose_socket_is_only_open_is_found_out():
    network = MemoryNetwork()
    listen = Multiaddr.parse("/ip4/0.0.0.0/tcp/1/ws")
    async with _joined(network.transport("10.0.0.1"), network.transport("10.0.0.2"), listen, "10.0.0.2") as joined:
        network.partition("10.0.0.1", "10.0.0.2")
        start = trio.current_time()
        await joined[0].wait_lost()
        assert trio.current_time() - start <= 10


async def test_credit_returns_when_the_application_consumes():
    async with _slow_line() as (connection, _, _):
        stream = connection.open_stream("/hold/1")
        stream.send_nowait({}, [bytes(MIB)], priority=Priority.BULK)
        await trio.sleep(60)
        # What a stream may hold unread has left, the rest waits for a reader that never comes.
        assert "unsent=983049" in repr(stream._core)
        async with connection.open_stream("/echo/1") as other:
            assert await _round_trip(other) < 0.01


async def test_a_decode_never_waits_behind_bulk():
    async with _slow_line() as (one, other, _):
        idle = await _idle_round_trip(one)
        async with trio.open_nursery() as nursery:
            for connection in (one, other):
                nursery.start_soon(_send_bulk_forever, connection)
            await trio.sleep(0.1)
            async with one.open_stream("/echo/1") as stream:
                times = [await _round_trip(stream) for _ in range(50)]
            nursery.cancel_scope.cancel()
        frame_s = 16 * 1024 / LINE_BYTES_A_SECOND
        # A frame of bulk that has just begun, in each direction, now and then a second one that has aged, and
        # a refund of credit: never the 0.34 s that one bulk message takes.
        assert max(times) < idle + 6 * frame_s
        assert sorted(times)[25] < idle + 3 * frame_s


async def test_bulk_goes_on_beside_a_stream_of_decodes():
    async with _slow_line() as (connection, _, _), trio.open_nursery() as nursery:
        async with connection.open_stream("/drain/1") as bulk:
            bulk.send_nowait({}, [bytes(MIB)], priority=Priority.BULK)
            for _ in range(4):
                nursery.start_soon(_send_decodes_forever, connection)
            with trio.fail_after(30):
                await bulk.wait_unsent_below(1)
        nursery.cancel_scope.cancel()


async def _idle_round_trip(connection):
    async with connection.open_stream("/echo/1") as stream:
        return max([await _round_trip(stream) for _ in range(5)])


async def _send_bulk_forever(connection):
    async with connection.open_stream("/drain/1", priority=Priority.BULK) as stream:
        while True:
            await stream.send({}, [bytes(4 * MIB)])


async def _send_decodes_forever(connection):
    async with connection.open_stream("/drain/1", priority=Priority.DECODE) as stream:
        while True:
            await stream.send({}, [bytes(64 * 1024)])


async def test_a_stream_that_is_reset_in_mid_message_frees_the_line_at_once():
    async with _slow_line() as (connection, _, _):
        stream = connection.open_stream("/echo/1")
        stream.send_nowait({}, [bytes(64 * MIB)], priority=Priority.BULK)
        await trio.sleep(0.1)
        stream.reset("cancelled")
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive()
        async with connection.open_stream("/echo/1") as other:
            assert await _round_trip(other, Priority.BULK) < 0.01


async def test_the_peer_hears_of_a_cancelled_request():
    heard = trio.Event()

    async def wait_for_reset(stream):
        with pytest.raises(StreamReset, match="cancelled"):
            await stream.receive()
        heard.set()

    async with _slow_line() as (connection, _, other):
        other.handlers["/wait/1"] = wait_for_reset
        with trio.move_on_after(1):
            async with connection.open_stream("/wait/1") as stream:
                await stream.receive()
        with trio.fail_after(1):
            await heard.wait()

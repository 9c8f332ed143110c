from __future__ import annotations

import pytest
import trio

from peerd.net.connection.uplink_meter import MIN_BYTES, UplinkMeter
from peerd.net.connections import Stream, open_connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import Priority
from peerd.protocol.identity import Identity
from peerd.testing.network import MemoryNetwork

MIB = 1024 * 1024


def send_all(meter: UplinkMeter, total: int, rate: float, buffer_bytes: int, now: float = 0.0) -> float:
    """Send without pause on a line with a buffer; returns when the last was handed over."""
    queued = 0.0
    for _ in range(total // 32768):
        began = now
        queued += 32768
        if queued > buffer_bytes:
            # Sockets wake their senders when a third of the buffer is free.
            now += (queued - buffer_bytes * 2 / 3) / rate
            queued = buffer_bytes * 2 / 3
        meter.sent(32768, began, now)
    return now


@pytest.mark.parametrize("buffer_bytes", [256 * 1024, 4 * MIB])
@pytest.mark.parametrize("rate", [1e6, 30e6])
def test_a_long_transfer_shows_the_line_and_not_the_buffer(rate: float, buffer_bytes: int) -> None:
    meter = UplinkMeter()
    send_all(meter, 64 * MIB, rate, buffer_bytes)
    assert meter.bytes_a_second == pytest.approx(rate, rel=0.05)


def test_what_fits_the_buffer_shows_nothing() -> None:
    meter = UplinkMeter()
    now = 0.0
    for _ in range(100):
        now = send_all(meter, 2 * MIB, 1e6, 4 * MIB, now) + 3
        meter.idle()
    assert meter.bytes_a_second is None


def test_a_pause_is_no_slowness() -> None:
    meter = UplinkMeter()
    now = 0.0
    for _ in range(5):
        now = send_all(meter, 3 * MIN_BYTES, 30e6, MIB, now) + 60
        meter.idle()
    assert meter.bytes_a_second == pytest.approx(30e6, rel=0.05)


async def test_connections_know_what_their_lines_take() -> None:
    network = MemoryNetwork(latency_s=0.01, bytes_a_second=2e6)
    address = Multiaddr.parse("/ip4/10.0.0.1/tcp/4000/ws")

    async def drain(stream: Stream) -> None:
        while True:
            await stream.receive(MIB)

    one, other = (Identity.from_seed(bytes([number]) * 32) for number in (1, 2))
    async with (
        open_connections(one, transport=network.transport("10.0.0.1"), listen=[address], handlers={"/drain/1": drain}),
        open_connections(other, transport=network.transport("10.0.0.2"), handlers={}) as ours,
    ):
        stream = await ours.open_stream(one.peer_id, "/drain/1", addresses=[address.with_peer(one.peer_id)])
        assert ours.uplink == 0.0
        for _ in range(24):
            await stream.send({}, [bytes(MIB)], priority=Priority.BULK)
        assert ours.uplink == pytest.approx(2e6, rel=0.05)
        ours.live[one.peer_id].close()
        assert ours.uplink == pytest.approx(2e6, rel=0.05)
        await trio.sleep(1)

"""A websocket message that comes in parts without end."""

from contextlib import suppress

import pytest
import trio

from peerd.protocol.errors import PeerFault
from tests.fakes.channels import listening, real_time


@real_time
@pytest.mark.parametrize(("messages", "limit"), [(0, 64 * 1024), (1, 1024 * 1024)])
async def test_a_message_in_parts_without_end_ends_the_channel(messages, limit):
    """An empty part costs the peer 6 bytes, and us as much as any other."""
    ended, heard = trio.Event(), []

    async def read(channel):
        with suppress(PeerFault):
            while True:
                heard.append(await channel.receive())
        ended.set()

    request = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: peerd.1\r\n\r\n"
    )
    whole, begun, empty = b"\x82\x81\0\0\0\0x", b"\x02\x80\0\0\0\0", b"\x00\x80\0\0\0\0" * 4096
    sent = 0
    async with listening(read) as bound:
        async with await trio.open_tcp_stream(bound.host, bound.port) as stream:
            await stream.send_all(request)
            await stream.receive_some()
            with suppress(trio.BrokenResourceError), trio.fail_after(20):
                await stream.send_all(whole * messages + begun)
                while not ended.is_set():
                    await stream.send_all(empty)
                    sent += len(empty)
                    # What the system buffers is sent, and never read.
                    await trio.sleep(0.01)
        with trio.fail_after(5):
            await ended.wait()
    assert heard == [b"x"] * messages
    assert limit / 2 <= sent <= limit + 8 * 2**20

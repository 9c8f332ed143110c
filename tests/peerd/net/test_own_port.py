"""Two transports that dial each other at the same moment, on real sockets of this machine."""

import errno
import socket
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from peerd.net.websockets import channel as channels
from peerd.net.websockets.tcp import remote
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.trio_tools import open_tasks
from tests.fakes.channels import echo, listening, real_time, wait

pytestmark = real_time


def at(port):
    return Multiaddr("ip4", "127.0.0.1", port)


@asynccontextmanager
async def two_listening():
    """Two transports, and where each listens."""
    client, server = WebSocketTransport(), WebSocketTransport()
    async with listening(wait, client) as here, listening(wait, server) as there, open_tasks() as tasks:
        yield (client, here.port), (server, there.port), tasks


@pytest.mark.parametrize("late_s", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)], ids=["both", "server first", "client first"])
async def test_whichever_side_dials_first_both_get_one_websocket_with_the_agreed_roles(late_s):
    async with two_listening() as ((client, here), (server, there), tasks):
        met = {}

        async def meet(transport, port, wait_s, *, as_server):
            await trio.sleep(wait_s)
            channel = met["server" if as_server else "client"] = await transport.meet(
                at(port), tasks, as_server=as_server
            )
            if not as_server:
                await channel.send(b"hi")

        with trio.fail_after(10), client.expecting(at(there)), server.expecting(at(here)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(meet, client, there, late_s[0], as_server=False))
                # A server's side upgrades when it reads.
                nursery.start_soon(partial(meet, server, here, late_s[1], as_server=True))
                with trio.fail_after(5):
                    while "server" not in met:
                        await trio.sleep(0.01)
                assert await met["server"].receive() == b"hi"
        await met["server"].send(b"ho")
        assert await met["client"].receive() == b"ho"
        assert (met["client"].remote_port, met["server"].remote_port) == (there, here)
        for channel in met.values():
            await channel.aclose()


async def test_a_peer_that_listens_nowhere_dials_from_the_same_port_each_time():
    ports = []

    async def note(channel):
        ports.append(channel.remote_port)
        await echo(channel)

    client = WebSocketTransport()
    async with listening(note) as one, listening(note) as other, open_tasks() as tasks:
        for bound in (one, other):
            await (await client.dial_from_own_port(bound, tasks)).aclose()
    assert len(ports) == 2
    assert len(set(ports)) == 1


async def test_a_listener_dials_from_its_own_port_and_no_other_process_can_listen_there():
    seen = []

    async def note(channel):
        seen.append(channel.remote_port)
        await echo(channel)

    transport = WebSocketTransport()
    async with listening(wait, transport) as own, listening(note) as other, open_tasks() as tasks:
        channel = await transport.dial_from_own_port(other, tasks)
        assert seen == [own.port]
        with socket.socket() as second:
            second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use") as refused:
                second.bind(("127.0.0.1", own.port))
            assert refused.value.errno == errno.EADDRINUSE
        await channel.aclose()


async def test_a_meeting_that_is_cancelled_leaves_nothing_behind():
    async with two_listening() as ((client, _), (_, there), tasks):
        with trio.move_on_after(0.1):
            await client.meet(at(there), tasks, as_server=False)
        assert repr(client._own_port).endswith("awaited=0>")


async def test_a_connection_that_is_reset_as_soon_as_it_is_open_is_dialled_again(monkeypatch):
    resets = []

    def remote_or_reset(stream):
        ip, port = remote(stream)
        if port == there and not resets:
            resets.append(port)
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return ip, port

    async with two_listening() as ((client, _), (_, there), tasks):
        monkeypatch.setattr(channels, "remote", remote_or_reset)
        with trio.fail_after(10):
            met = await client.meet(at(there), tasks, as_server=True)
        assert met.remote_port == there
        met.abort()
    assert resets == [there]

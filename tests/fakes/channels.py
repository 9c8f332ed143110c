"""Channels over a transport: a listener for a test, and what it answers."""

from contextlib import asynccontextmanager

import pytest
import trio

from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import PeerFault
from peerd.trio_tools import open_tasks

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0/ws")

real_time = pytest.mark.real_time


@asynccontextmanager
async def listening(handler, transport=None, address=LOOPBACK):
    transport = transport or WebSocketTransport()
    async with trio.open_nursery() as nursery:
        yield await nursery.start(transport.listen, address, handler)
        nursery.cancel_scope.cancel()


async def echo(channel):
    try:
        while True:
            await channel.send(await channel.receive())
    except PeerFault:
        pass


@asynccontextmanager
async def dial(transport, address):
    async with open_tasks() as tasks:
        channel = await transport.dial(address, tasks)
        try:
            yield channel
        finally:
            await channel.aclose()


async def wait(_channel):
    await trio.sleep_forever()

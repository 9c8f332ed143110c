"""A few peers on a network in memory, each with its connections."""

from contextlib import AsyncExitStack, asynccontextmanager, suppress

import trio

from peerd.net.connections import open_connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.connection import ConnectionMachine
from peerd.protocol.errors import (
    ConnectionLost,
)
from peerd.protocol.identity import Identity
from peerd.testing.network import MemoryNetwork

LISTEN = Multiaddr.parse("/ip4/0.0.0.0/tcp/31330/ws")

# Sorted by PeerId: of two, the one with the smaller id chooses between connections.
IDENTITIES = sorted((Identity.from_seed(bytes([n]) * 32) for n in range(1, 9)), key=lambda one: one.peer_id)


def address_of(number):
    return Multiaddr("ip4", f"10.0.0.{number}", 31330)


class Swarm:
    """Peers by number, each on its own host `10.0.0.<number>`."""

    def __init__(self, network, stack):
        self.network = network
        self.stack = stack

    async def start(self, number, handlers=None, **arguments):
        arguments.setdefault("listen", [LISTEN])
        return await self.stack.enter_async_context(
            open_connections(
                arguments.pop("identity", None) or IDENTITIES[number],
                transport=self.network.transport(f"10.0.0.{number}"),
                handlers=handlers or {"/echo/1": echo},
                **arguments,
            )
        )

    async def pair(self, handlers=None):
        return await self.start(0, handlers), await self.start(1, handlers)


@asynccontextmanager
async def open_connected(latency_s=0.01, **arguments):
    async with AsyncExitStack() as stack:
        yield Swarm(MemoryNetwork(latency_s=latency_s, **arguments), stack)


async def echo(stream):
    while True:
        try:
            message = await stream.receive(1 << 26)
        except trio.EndOfChannel:
            return
        await stream.send(message.header, [message.body])


async def sink(_stream):
    await trio.sleep_forever()


async def ask(connections, number, body=b"hi"):
    stream = await connections.open_stream(IDENTITIES[number].peer_id, "/echo/1", addresses=[address_of(number)])
    async with stream:
        await stream.send({"n": 1}, [body])
        return bytes((await stream.receive(2**20)).body)


class Rogue:
    """One number's identity, dialling another with a bare protocol machine."""

    def __init__(self, swarm, number=1):
        self.core = ConnectionMachine(IDENTITIES[number], initiator=True, now=trio.current_time())
        self._transport = swarm.network.transport(f"10.0.0.{number}")

    async def shake(self, other=0):
        self.channel = await self._transport.dial(address_of(other))
        await self.flush()
        self.core.receive(await self.channel.receive(), trio.current_time())
        await self.flush()

    async def flush(self):
        with suppress(ConnectionLost):  # what it said before it closed is still to be read
            while (message := self.core.next_message(trio.current_time())) is not None:
                await self.channel.send(message)

    async def until(self, kind):
        """Answer like an honest peer until an event of this kind comes."""
        while True:
            while (event := self.core.next_event()) is not None:
                if isinstance(event, kind):
                    return event
            self.core.receive(await self.channel.receive(), trio.current_time())
            await self.flush()

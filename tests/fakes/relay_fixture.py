"""A world of relays in a network in memory: two relays that can be dialled, and peers behind NATs that cannot."""

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from random import Random

import trio

from peerd.net.connections import open_connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.encoding.schema import parse
from peerd.protocol.identity import Identity
from peerd.protocol.messages.relay import (
    RELAY_PROTOCOL,
    RELAY_ROLE,
    Accepted,
    Connected,
    IncomingCall,
    Reserve,
    Reserved,
)
from peerd.protocol.messages.session import Failure
from peerd.reach.relay import Relay
from peerd.reach.relay_ledger import RelayLimits
from peerd.reach.reservations import open_reservations
from peerd.routing.dht.table import Contact
from peerd.testing.network import MemoryNetwork

LISTEN = Multiaddr.parse("/ip4/0.0.0.0/tcp/31330/ws")
IDENTITIES = [Identity.from_seed(bytes([n]) * 32) for n in range(1, 60)]
ALL_ANSWERS = (Reserved, Connected, IncomingCall, Accepted, Failure)
LATENCY_S = 0.01
KEY = b"k" * 32


def id_of(number):
    return IDENTITIES[number].peer_id


def address(number):
    """The address of a peer that can be dialled."""
    return Multiaddr("ip4", f"8.8.{number}.8", 31330, peer_id=id_of(number))


def way(relay, peer):
    """The address of a peer that cannot, through a relay."""
    return Multiaddr("ip4", f"8.8.{relay}.8", 31330, peer_id=id_of(peer), relay=id_of(relay))


async def echo(stream):
    while True:
        try:
            message = await stream.receive(1 << 26)
        except trio.EndOfChannel:
            return
        await stream.send(message.header, [message.body])


async def sink(stream):
    while True:
        await stream.receive(1 << 26)


class World:
    """Relays at 1 and 2, which know each other; peers behind NATs from 10 on."""

    def __init__(self, stack, network):
        self.stack = stack
        self.network = network
        self.relays = {}
        self.announced = {}

    async def start(self, number, *, listen=(), handlers=None, **arguments):
        """A peer that nobody can dial, unless it listens."""
        return await self.stack.enter_async_context(
            open_connections(
                arguments.pop("identity", IDENTITIES[number]),
                transport=self.network.transport(f"8.8.{number}.8"),
                listen=listen,
                handlers=handlers or {"/echo/1": echo, "/sink/1": sink},
                **arguments,
            )
        )

    async def relay(self, number, *, swarm_key=None, **limits):
        connections = await self.start(number, listen=[LISTEN], roles=[RELAY_ROLE], swarm_key=swarm_key)
        connections.present_as(listen_as=[address(number).with_peer(None)])
        relay = self.relays[number] = Relay(id_of(number), RelayLimits(**limits))
        connections.handlers[RELAY_PROTOCOL] = relay.answer
        return connections

    async def behind(self, number, *relays, **arguments):
        """A peer behind a NAT that keeps reservations at the relays that it knows."""
        connections = await self.start(number, **arguments)
        self.announced[number] = ()

        def on_change(addresses):
            self.announced[number] = addresses

        contacts = [Contact(id_of(relay), (address(relay),)) for relay in relays]
        keeping = open_reservations(connections, lambda: contacts, on_change, Random(number), wanted=True)
        reservations = await self.stack.enter_async_context(keeping)
        await until(lambda: len(reservations.held) == min(2, len(relays)))
        return connections, reservations

    def ways(self, number):
        """The announced addresses of a peer behind a NAT."""
        return [replace(one, relay=one.peer_id, peer_id=id_of(number)) for one in self.announced[number]]


async def until(condition):
    with trio.fail_after(600):
        while not condition():
            await trio.sleep(0.01)


@asynccontextmanager
async def open_world(**network):
    async with AsyncExitStack() as stack:
        yield World(stack, MemoryNetwork(latency_s=LATENCY_S, **network))


async def ask(connections, number, *ways, body=b"hi"):
    stream = await connections.open_stream(id_of(number), "/echo/1", addresses=ways)
    async with stream:
        await stream.send({"n": 1}, [body])
        return bytes((await stream.receive(1 << 26)).body)


async def say(stream, message, expected=ALL_ANSWERS):
    await stream.send(message.to_header())
    return parse((await stream.receive(max_body=0)).header, expected)


async def refusal(connections, relay, message):
    stream = await connections.open_stream(id_of(relay), RELAY_PROTOCOL, addresses=[address(relay)])
    said = await say(stream, message)
    assert isinstance(said, Failure), said
    return said


async def reserve(connections, relay):
    """A reservation made by hand: its stream."""
    stream = await connections.open_stream(id_of(relay), RELAY_PROTOCOL, addresses=[address(relay)])
    assert isinstance(await say(stream, Reserve()), Reserved)
    return stream

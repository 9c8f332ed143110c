"""The attacks of `hostile_bench`, which one process makes on one peer, by chance and at a rate.

Half of them come from strangers, half from peers that prove a key of their own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random

import trio

from peerd.net.transport import MessageChannel
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import CreditFrame, Frame, PingFrame, ResetFrame, encode_frame
from peerd.protocol.connection.noise import Handshake
from peerd.protocol.errors import PeerFault
from peerd.protocol.identity import Identity
from peerd.protocol.messages.session import INFER_PROTOCOL
from peerd.testing.hostile import (
    HostilePeer,
    Target,
    conversations,
    hello_message,
    message_bytes,
    mutated,
    mutated_bytes,
    mutated_header,
)

# The longest that one attack may take.
ATTACK_S = 8.0
MAX_AT_ONCE = 48
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: peerd.1\r\n\r\n"
)


@dataclass
class Attackers:
    """Attacks one peer, and counts the attacks by kind."""

    address: Multiaddr
    target: Target
    random: Random
    sent: Counter[str] = field(default_factory=Counter)

    async def run(self, seconds: float, rate: float) -> None:
        """Attack for `seconds`, as strangers and as known peers, each `rate` times a second."""
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_at_it, nursery, rate, self._strangers())
                nursery.start_soon(self._keep_at_it, nursery, rate, self._known())

    def _strangers(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "garbage on TCP": self.tcp_garbage,
            "half websocket handshakes": self.half_upgrade,
            "garbage in websockets": self.websocket_garbage,
            "garbage in Noise": self.noise_garbage,
            "slow connections": self.slow,
        }

    def _known(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "mutated conversations": self.mutated_conversations,
            "mutated frames": self.mutated_frames,
            "mutated hellos": self.mutated_hello,
            "floods of opens and resets": self.flood_opens,
            "floods of pings and credit": self.flood_pings,
            "huge claims": self.claims,
        }

    async def _keep_at_it(
        self, nursery: trio.Nursery, rate: float, kinds: dict[str, Callable[[], Awaitable[None]]]
    ) -> None:
        limit = trio.CapacityLimiter(MAX_AT_ONCE)
        next_at = trio.current_time()
        while True:
            name = self.random.choice(list(kinds))
            nursery.start_soon(self._attack, limit, name, kinds[name])
            next_at += 1 / rate
            await trio.sleep_until(next_at)

    async def _attack(self, limit: trio.CapacityLimiter, name: str, attack: Callable[[], Awaitable[None]]) -> None:
        async with limit:
            with trio.move_on_after(ATTACK_S):
                try:
                    await attack()
                except* (OSError, trio.BrokenResourceError, PeerFault):
                    # The server ended the connection, as it should.
                    pass
            self.sent[name] += 1

    async def tcp_garbage(self) -> None:
        async with await trio.open_tcp_stream(self.address.host, self.address.port) as stream:
            for _ in range(self.random.randrange(1, 5)):
                await stream.send_all(self.random.randbytes(self.random.choice([1, 100, 4000])))
            await stream.receive_some(100)

    async def half_upgrade(self) -> None:
        request = mutated_bytes(UPGRADE, self.random) if self.random.random() < 0.7 else UPGRADE
        async with await trio.open_tcp_stream(self.address.host, self.address.port) as stream:
            await stream.send_all(request[: self.random.randrange(1, len(request) + 1)])
            with trio.move_on_after(self.random.choice([0.01, 3])):
                await stream.receive_some(1000)

    async def websocket_garbage(self) -> None:
        async with await trio.open_tcp_stream(self.address.host, self.address.port) as stream:
            await stream.send_all(UPGRADE)
            await stream.receive_some(1000)
            head = self.random.choice([b"\x82\xfe\xff\xff", b"\x82\xff" + b"\x7f" * 8, b"\x89\xff", b"\x81\x85", b""])
            await stream.send_all(head + self.random.randbytes(self.random.choice([4, 200, 40_000])))
            await stream.receive_some(1000)

    async def noise_garbage(self) -> None:
        handshake = Handshake(Identity.generate(), initiator=True)
        first = handshake.write()
        async with self._dialled() as channel:
            if self.random.random() < 0.5:
                await channel.send(mutated_bytes(first, self.random))
            else:
                await channel.send(first)
                handshake.read(await channel.receive())
                await channel.send(mutated_bytes(handshake.write(), self.random))
            await channel.send(self.random.randbytes(self.random.choice([1, 96, 30_000])))
            await channel.receive()

    async def slow(self) -> None:
        async with await trio.open_tcp_stream(self.address.host, self.address.port) as stream:
            for byte in UPGRADE:
                await stream.send_all(bytes([byte]))
                await trio.sleep(0.5)

    async def mutated_conversations(self) -> None:
        """Hold up to five conversations on one connection, each with one thing wrong."""
        identity = Identity.generate()
        for_now = conversations(identity, self.target, self.random.randbytes(16), time.time(), self.random)

        async def attack(peer: HostilePeer) -> None:
            for _ in range(5):
                which = self.random.randrange(len(for_now))
                if which == len(for_now) - 1:
                    # A link refers to its session, so open that first.
                    protocol, messages = for_now[which - 1]
                    await peer.say(await peer.open(protocol), message_bytes(*messages[0]))
                protocol, data = mutated(for_now[which], self.random)
                stream = await peer.open(protocol)
                await peer.say(stream, data, fin=self.random.random() < 0.3)
                await trio.sleep(self.random.choice([0.0, 0.05, 0.5]))
                if self.random.random() < 0.7:
                    await peer.send(encode_frame(ResetFrame(stream, "cancelled")))

        await self._as_peer(identity, attack)

    async def mutated_frames(self) -> None:
        async def attack(peer: HostilePeer) -> None:
            stream = await peer.open(INFER_PROTOCOL)
            frames: list[Frame] = [PingFrame(bytes(8)), CreditFrame(stream, 2**31 - 1), ResetFrame(stream, "cancelled")]
            while True:
                await peer.send(mutated_bytes(encode_frame(self.random.choice(frames)), self.random))
                await trio.sleep(0.02)

        await self._as_peer(Identity.generate(), attack)

    async def mutated_hello(self) -> None:
        hello = message_bytes(mutated_header(hello_message(time.time()), self.random))
        await self._as_peer(Identity.generate(), _stay, mutated_bytes(hello, self.random))

    async def flood_opens(self) -> None:
        async def attack(peer: HostilePeer) -> None:
            resets = self.random.random() < 0.5
            for _ in range(400):
                stream = await peer.open(self.random.choice([INFER_PROTOCOL, "/peerd/dht/1", "/nobody/9"]))
                if resets:
                    await peer.send(encode_frame(ResetFrame(stream, "cancelled")))

        await self._as_peer(Identity.generate(), attack)

    async def flood_pings(self) -> None:
        async def attack(peer: HostilePeer) -> None:
            stream = await peer.open(INFER_PROTOCOL)
            for count in range(500):
                await peer.send(encode_frame(PingFrame(count.to_bytes(8, "big"))))
                await peer.send(encode_frame(CreditFrame(stream, 1 + count)))

        await self._as_peer(Identity.generate(), attack)

    async def claims(self) -> None:
        """Announce a header of 16 KiB and a body of 4 GiB without sending them, and ask for a session too large for any
        server.
        """
        vast = {"max_length": 2**24, "max_rows": 256, "max_steps": 64, "timeout_ms": 600_000}
        identity = Identity.generate()
        protocol, messages = conversations(identity, self.target, bytes(16), time.time(), self.random)[-2]

        async def attack(peer: HostilePeer) -> None:
            for _ in range(20):
                await peer.say(await peer.open(protocol), b"\0\0\x40\0" + bytes(9000))
            await peer.say(await peer.open(protocol), message_bytes(messages[0][0] | vast))
            stream = await peer.open(protocol)
            opening, body = messages[0]
            await peer.say(stream, message_bytes(opening, body))
            step = message_bytes(messages[1][0])[:-4]
            await peer.say(stream, step + b"\xff\xff\xff\xff" + bytes(10_000))
            await trio.sleep(1)

        await self._as_peer(identity, attack)

    async def _as_peer(
        self, identity: Identity, attack: Callable[[HostilePeer], Awaitable[None]], hello: bytes | None = None
    ) -> None:
        """Attack over a connection that the server accepts, in most cases reading what it sends."""
        async with self._dialled() as channel:
            peer = HostilePeer(identity, channel)
            await peer.enter(message_bytes(hello_message(time.time())) if hello is None else hello)
            async with trio.open_nursery() as nursery:
                if self.random.random() < 0.8:
                    nursery.start_soon(_listen, peer)
                with suppress(PeerFault):
                    await attack(peer)
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def _dialled(self) -> AsyncIterator[MessageChannel]:
        async with trio.open_nursery() as tasks:
            channel = await WebSocketTransport().dial(self.address, tasks)
            try:
                yield channel
            finally:
                await channel.aclose()
                tasks.cancel_scope.cancel()


async def _stay(peer: HostilePeer) -> None:
    await trio.sleep(1)


async def _listen(peer: HostilePeer) -> None:
    with suppress(PeerFault):
        while True:
            await peer.hear()

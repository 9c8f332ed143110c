"""Peers that break the rules, for tests and measurements: they have a real connection and send anything on it.

They follow the wire format far enough to pass one check and break the next: random garbage never gets past the first.
All choices come from a `Random` of the caller's, so a failure can be reproduced. Nothing here dials: the caller brings
a channel, which must lead to a peer of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

from peerd.exchange.step_tensors import encoded
from peerd.net.transport import MessageChannel
from peerd.protocol.connection.frames import (
    MAX_PAYLOAD_BYTES,
    Frame,
    OpenFrame,
    Priority,
    decode_frame,
    encode_data,
    encode_frame,
)
from peerd.protocol.connection.hello import HELLO_PROTOCOL, Hello
from peerd.protocol.connection.noise import CipherState, Handshake
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES
from peerd.protocol.encoding.packing import pack
from peerd.protocol.identity import Identity, PeerId, node_id_of
from peerd.protocol.messages.session import INFER_PROTOCOL, LINK_PROTOCOL, Link, NextHop, OpenSession, Route, Step
from peerd.protocol.messages.tickets import Ticket, sign_ticket
from peerd.protocol.records.envelope import PeerRecord, sign_record
from peerd.protocol.records.keys import peer_key
from peerd.protocol.rows import Drop, Fork, RowSlice
from peerd.protocol.span import Span
from peerd.routing.dht.messages import DHT_PROTOCOL, FindNode, FindValue, Ping, Store, pack_records

Header = dict[str, Any]
Conversation = tuple[str, tuple[tuple[Header, bytes], ...]]
"""A protocol, and the messages that its opener sends on one stream."""

_TTL_S = 300
# Values that a type or range check might miss, or that might break a program.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 255, 256, 4096, 2**24, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1),
    *(0.0, -1.5, 1e308, math.nan, math.inf),
    *("", "a", "step", "none", "\0", "ü" * 20, "x" * 65, "x" * 600),
    *(b"", b"\0", bytes(16), bytes(32), bytes(200), bytes(2000)),
    *([], [[]], [0], [[0, 0, 1]], [[0, 0]], [["fork"]], [[["fork"], 0, 0, 0]], [{}], [None] * 300, [[[[[[[]]]]]]]),
    *({}, {"type": "step"}, {"shape": []}, {"shape": [1, 8], "dtype": "float32", "codec": "exact"}),
)
_WORDS = (bytes(4), b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\xc7\xd6\xdf\xc1")


@dataclass(frozen=True, slots=True)
class Target:
    """What a hostile peer knows of its target: facts that every user of it can learn."""

    peer_id: PeerId
    model: bytes
    span: Span
    width: int


class HostilePeer:
    """One authenticated connection, frame by frame. Call `enter` first. `hear` must run, or frames from the target pile
    up.
    """

    def __init__(self, identity: Identity, channel: MessageChannel) -> None:
        self._identity = identity
        self._channel = channel
        self._ciphers: tuple[CipherState, CipherState] | None = None
        self._next_stream = 1

    async def enter(self, hello: bytes) -> None:
        """Prove our identity and send `hello`, an encoded message. Raises PeerFault if we are refused."""
        handshake = Handshake(self._identity, initiator=True)
        await self._channel.send(handshake.write())
        handshake.read(await self._channel.receive())
        await self._channel.send(handshake.write())
        self._ciphers = handshake.split()
        if self._identity.peer_id < handshake.peer_id:
            stream = await self.open(HELLO_PROTOCOL)
        else:
            # The other side chooses, and so it begins.
            frame = await self.hear()
            while not isinstance(frame, OpenFrame):
                frame = await self.hear()
            stream = frame.stream
        await self.say(stream, hello, fin=True)

    async def be_entered(self, request: bytes, hello: bytes) -> None:
        """The same for a channel that the target has dialled; `request` is the first message that came on it."""
        handshake = Handshake(self._identity, initiator=False)
        handshake.read(request)
        await self._channel.send(handshake.write())
        handshake.read(await self._channel.receive())
        self._ciphers = handshake.split()
        # Streams of the side that was dialled have even numbers.
        self._next_stream = 2
        if self._identity.peer_id < handshake.peer_id:
            stream = await self.open(HELLO_PROTOCOL)
        else:
            frame = await self.hear()
            while not isinstance(frame, OpenFrame):
                frame = await self.hear()
            stream = frame.stream
        await self.say(stream, hello, fin=True)

    async def open(self, protocol: str) -> int:
        """Open a stream, and return its number."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        await self.send(encode_frame(OpenFrame(stream, protocol, Priority.DECODE, INITIAL_CREDIT_BYTES)))
        return stream

    async def say(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        """Send DATA frames on a stream, whether or not there is credit for them."""
        for at in range(0, max(len(data), 1), MAX_PAYLOAD_BYTES):
            part = data[at : at + MAX_PAYLOAD_BYTES]
            ends = fin and at + MAX_PAYLOAD_BYTES >= len(data)
            if part or ends:
                await self.send(encode_data(stream, [part], fin=ends))

    async def send(self, frame: bytes) -> None:
        """Send any bytes as a correctly encrypted frame. Raises ConnectionLost."""
        assert self._ciphers is not None
        await self._channel.send(self._ciphers[0].encrypt(frame))

    async def hear(self) -> Frame:
        """The next frame from the target. Raises ConnectionLost."""
        assert self._ciphers is not None
        return decode_frame(self._ciphers[1].decrypt(await self._channel.receive()))

    async def aclose(self) -> None:
        await self._channel.aclose()


def hello_message(now: float) -> Header:
    """A hello like that of an honest peer."""
    hello = Hello("hostile", int(now * 1e6), ("/peerd/dht/1",), ("/ip4/192.0.2.1/tcp/1/ws",), "192.0.2.2", ("serve",))
    return hello.to_header()


def message_bytes(header: Header, body: bytes = b"") -> bytes:
    """A message as bytes of a stream, however long its header is."""
    packed = pack(header)
    return b"".join((len(packed).to_bytes(4, "big"), packed, len(body).to_bytes(4, "big"), body))


def conversations(identity: Identity, target: Target, session: bytes, now: float, random: Random) -> list[Conversation]:
    """Honest messages to `target` in every protocol, one stream each; links come after their session."""
    early, late = tuple(_steps(target, random, epoch=0)), tuple(_steps(target, random, epoch=1))
    opening = OpenSession(
        session=session,
        hop=0,
        epoch=0,
        model=target.model,
        start=target.span.start,
        end=target.span.end,
        max_length=64,
        max_rows=2,
        max_steps=16,
        timeout_ms=100,
        needs=("fork",),
    )
    onward = Ticket(session, 2, 1, target.peer_id, identity.peer_id, int(now) + _TTL_S)
    inward = Ticket(session, 0, 1, identity.peer_id, target.peer_id, int(now) + _TTL_S)
    record = sign_record(identity, PeerRecord(1, now + _TTL_S, ("/ip4/192.0.2.1/tcp/1/ws",)))
    # To an address that nobody has: the network for documentation.
    next_hop = NextHop(sign_ticket(identity, onward), record.encode())
    longer = replace(opening, hop=1, next=next_hop, dtype="float16", codec="int8").to_header()
    key, here = peer_key(identity.peer_id), node_id_of(identity.peer_id)
    link = Link(session, sign_ticket(identity, inward))
    return [
        (DHT_PROTOCOL, ((Ping().to_header(), b""),)),
        (DHT_PROTOCOL, ((FindNode(here).to_header(), b""),)),
        (DHT_PROTOCOL, ((FindValue(key).to_header(), b""),)),
        (DHT_PROTOCOL, ((Store(key).to_header(), pack_records([record.encode()])),)),
        (INFER_PROTOCOL, ((longer, b""), *early, (Route(epoch=1, next=next_hop).to_header(), b""), *late)),
        (INFER_PROTOCOL, ((opening.to_header(), b""), *early, (Route(epoch=1).to_header(), b""), *late)),
        (LINK_PROTOCOL, ((link.to_header(), b""), *late)),
    ]


def mutated(conversation: Conversation, random: Random) -> tuple[str, bytes]:
    """The conversation as bytes of a stream, with one error: in a field, in some bytes, or in the order."""
    protocol, messages = conversation
    parts = list(messages)
    where = random.randrange(len(parts))
    header, body = parts[where]
    kind = random.random()
    if kind < 0.6:
        parts[where] = mutated_header(header, random), body
    elif kind < 0.7:
        parts[where] = header, mutated_bytes(body, random)
    elif kind < 0.8:
        parts.insert(where, parts[random.randrange(len(parts))])
    wire = [message_bytes(header, body) for header, body in parts]
    if kind >= 0.8:
        wire[where] = mutated_bytes(wire[where], random)
    return protocol, b"".join(wire)


def mutated_header(header: Header, random: Random) -> Header:
    """A copy with one field, at any depth, replaced, removed, repeated or added."""
    copy: Header = _copied(header)
    place, name = random.choice(list(_places(copy)))
    match random.randrange(6):
        case 0:
            del place[name]
        case 1:
            copy[random.choice(["extra", "seq", "epoch", "next", "needs", "tensor"])] = random.choice(_VALUES)
        case 2 if isinstance(place[name], list):
            place[name] = place[name] * random.choice([2, 40])
        case 3 if type(place[name]) is int:
            # MessagePack has no greater ones.
            place[name] = min(place[name] + random.choice([-1, 1, 255, 2**16]), 2**64 - 1)
        case 4 if type(place[name]) is bytes:
            place[name] = mutated_bytes(place[name], random)
        case _:
            place[name] = random.choice(_VALUES)
    return copy


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """A copy with bits flipped, or bytes lost, repeated or overwritten."""
    copy = bytearray(data or b"\0")
    at = random.randrange(len(copy))
    match random.randrange(5):
        case 0:
            copy[at] ^= 1 << random.randrange(8)
        case 1:
            del copy[at:]
        case 2:
            copy[at:at] = random.randbytes(random.choice([1, 8, 300]))
        case 3:
            copy[at : at + 4] = random.choice(_WORDS)
        case _:
            copy[at : at + 16] = copy[:16]
    return bytes(copy)


def _steps(target: Target, random: Random, epoch: int) -> Iterator[tuple[Header, bytes]]:
    """Steps of a session with two rows of 64 positions."""
    generator = torch.Generator().manual_seed(random.randrange(2**32))

    def step(count: int, row: int, start: int, seq: int, **fields: Any) -> tuple[Header, bytes]:
        hidden = torch.randint(0, 251, (count, target.width), generator=generator).float() / 16
        message = Step(epoch=epoch, seq=seq, rows=(RowSlice(row, start, count),), **fields)
        header, body = encoded(message, hidden, "exact", torch.float32)
        return header, b"".join(body)

    yield step(5, 0, 0, 1)
    yield step(1, 0, 5, 2, want="all")
    yield step(2, 1, 3, 3, ops=(Fork(0, 1, 3),), needs=("fork",))
    yield step(1, 0, 2, 4, ops=(Drop(1),), want="none")
    yield Step(epoch=epoch, seq=5, rows=()).to_header(), b""


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every field at any depth, as its container and its name or index."""
    names = list(value) if isinstance(value, dict) else range(len(value))
    for name in names:
        yield value, name
        if isinstance(value[name], dict | list):
            yield from _places(value[name])


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value

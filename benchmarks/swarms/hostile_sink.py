"""A peer that takes connections, proves a key, and drops everything else unread: what attackers cost by themselves.

Attackers burn the cores that server and client need. `hostile_bench` lets them attack this sink first, which leaves the
server alone, so that the two shares of a loss can be told apart. The sink answers just so much that each attack runs
as it would against a peer, and ends each connection as a peer does, when it has no more patience with it.
"""

from __future__ import annotations

import base64
import hashlib

import trio

from peerd.protocol.connection.frames import OpenFrame, Priority, encode_frame
from peerd.protocol.connection.hello import HELLO_PROTOCOL
from peerd.protocol.connection.noise import Handshake
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import Identity

# A peer waits as long for a stranger's proof; one that has proved a key mostly breaks a rule within a second.
UNPROVEN_S = 10.0
PROVEN_S = 1.0
RECEIVE_BYTES = 64 * 1024
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_BINARY = 0x82


class Sink:
    """A listener on loopback; `identity` is what it proves."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    def __repr__(self) -> str:
        return f"<Sink {self.identity.peer_id}>"

    async def run(self, *, task_status: trio.TaskStatus[int]) -> None:
        """Take connections until cancelled. Starts with the number of its port."""
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, [listener])
            task_status.started(listener.socket.getsockname()[1])

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                with trio.move_on_after(UNPROVEN_S):
                    await self._prove(stream)
                with trio.move_on_after(PROVEN_S):
                    while await stream.receive_some(RECEIVE_BYTES):
                        pass
            except (OSError, trio.BrokenResourceError, PeerdError, ValueError):
                return

    async def _prove(self, stream: trio.SocketStream) -> None:
        """Upgrade, shake hands, and open the stream for the hello where that is our turn. Raises ValueError for what
        is no websocket.
        """
        messages = _Messages(stream)
        request = await messages.until(b"\r\n\r\n")
        await stream.send_all(_answer(request))
        handshake = Handshake(self.identity, initiator=False)
        handshake.read(await messages.next())
        await stream.send_all(_framed(handshake.write()))
        handshake.read(await messages.next())
        if self.identity.peer_id < handshake.peer_id:
            hello = OpenFrame(2, HELLO_PROTOCOL, Priority.CONTROL, INITIAL_CREDIT_BYTES)
            await stream.send_all(_framed(handshake.split()[0].encrypt(encode_frame(hello))))


class _Messages:
    """Reads a client's websocket messages of one frame each, without checks. Raises ValueError at the end."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._data = b""

    async def until(self, mark: bytes) -> bytes:
        while mark not in self._data:
            await self._more()
        found, _, self._data = self._data.partition(mark)
        return found

    async def next(self) -> bytes:
        head = await self._take(2)
        length = head[1] & 0x7F
        if length == 126:
            length = int.from_bytes(await self._take(2), "big")
        mask = await self._take(4)
        masked = await self._take(length)
        return bytes(byte ^ mask[at % 4] for at, byte in enumerate(masked))

    async def _take(self, count: int) -> bytes:
        while len(self._data) < count:
            await self._more()
        found, self._data = self._data[:count], self._data[count:]
        return found

    async def _more(self) -> None:
        data = await self._stream.receive_some(RECEIVE_BYTES)
        if not data or len(self._data) > RECEIVE_BYTES:
            raise ValueError("no websocket of ours")
        self._data += data


def _answer(request: bytes) -> bytes:
    """The answer to an upgrade, as RFC 6455 has it. Raises ValueError for a request without a key."""
    for line in request.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"sec-websocket-key":
            accept = base64.b64encode(hashlib.sha1(value.strip() + _MAGIC, usedforsecurity=False).digest())
            head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            return head + b"Sec-WebSocket-Protocol: peerd.1\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    raise ValueError("no upgrade to a websocket")


def _framed(message: bytes) -> bytes:
    """A server's websocket message in one frame."""
    size = bytes([len(message)]) if len(message) < 126 else b"\x7e" + len(message).to_bytes(2, "big")
    return bytes([_BINARY]) + size + message

"""A peer's connection to itself: a server asks as a client too, or is two hops of one chain.

Knows both ends and carries messages between them in memory; what is said is the handlers' business, as on
any connection, with the same credit and priorities. The difficulty is the handshake, which refuses
ourselves, and rightly: so it runs between two identities made up for it. It has nothing to prove here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address

import trio

from peerd.net.peer_connection import Owner, PeerConnection, StreamHandler
from peerd.protocol.connection.connection import Connection, Limits
from peerd.protocol.connection.hello import Hello
from peerd.protocol.connection.liveness import Delivery
from peerd.protocol.errors import ConnectionLost
from peerd.protocol.identity import Identity, PeerId

# As much as a socket holds: an end that closes must not wait for the other to read its last words.
_PIPE_MESSAGES = 16


class LoopbackConnection(PeerConnection):
    """One of its ends. `peer_id` is our own."""

    def __init__(self, core: Connection, channel: _Pipe, owner: Owner, own: PeerId) -> None:
        super().__init__(core, channel, owner)
        self._own = own

    @property
    def peer_id(self) -> PeerId:
        return self._own


def loopback(owner: Owner, own: PeerId, limits: Limits) -> tuple[PeerConnection, Callable[[], Awaitable[None]]]:
    """The end on which we open streams, and what runs both. It can be used once it has said hello."""
    there, from_here = trio.open_memory_channel[bytes](_PIPE_MESSAGES)
    here, from_there = trio.open_memory_channel[bytes](_PIPE_MESSAGES)
    now = trio.current_time()
    asks, answers = (
        Connection(Identity.generate(), initiator=dials, now=now, limits=limits) for dials in (True, False)
    )
    near = LoopbackConnection(asks, _Pipe(there, from_there), _End(owner, near=True), own)
    far = LoopbackConnection(answers, _Pipe(here, from_here), _End(owner, near=False), own)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.run)
            nursery.start_soon(far.run)

    return near, run


class _End:
    """What an end asks of its owner. The near one settles matters, the far one has the handlers."""

    def __init__(self, owner: Owner, *, near: bool) -> None:
        self.handlers: dict[str, StreamHandler] = {} if near else owner.handlers
        self._owner = owner
        self._near = near

    def hello_to(self, connection: PeerConnection) -> Hello:
        return self._owner.hello_to(connection)

    def decides(self, _peer_id: PeerId) -> bool:
        return self._near

    async def decide(self, _connection: PeerConnection) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    def can_spare_one(self) -> bool:
        return False

    def settled(self, _connection: PeerConnection) -> None:
        """Nobody else is told: who watches connections wants to know about others."""

    def ended(self, _connection: PeerConnection) -> None:
        """As for `settled`."""

    def refuses(self, _connection: PeerConnection) -> bool:
        return False

    def contain(self, error: Exception, what: str, connection: PeerConnection) -> None:
        self._owner.contain(error, what, connection)


class _Pipe:
    """One end of a message channel in memory."""

    def __init__(self, sender: trio.MemorySendChannel[bytes], receiver: trio.MemoryReceiveChannel[bytes]) -> None:
        self._sender = sender
        self._receiver = receiver

    def __repr__(self) -> str:
        return "<pipe to ourselves>"

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        return None

    def delivery(self) -> Delivery | None:
        return None

    async def send(self, message: bytes) -> None:
        try:
            await self._sender.send(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ConnectionLost("the connection to ourselves was closed") from None

    async def receive(self) -> bytes:
        try:
            return await self._receiver.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise ConnectionLost("the connection to ourselves was closed") from None

    async def aclose(self) -> None:
        self._sender.close()
        self._receiver.close()
        await trio.lowlevel.checkpoint()

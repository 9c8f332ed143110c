"""A peer's connection to itself, in memory, for example when it is two hops of one chain.

Handlers, credit and priorities work as on any connection. The hard part is the handshake, which rightly refuses our own
PeerId. So it runs between two identities made up for it; in memory there is nothing to prove.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from ipaddress import IPv4Address, IPv6Address

import trio

from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.connection.settling import agree, exchange_hellos
from peerd.net.containment import Containment
from peerd.net.handlers import StreamHandler
from peerd.net.introduction import Introduction
from peerd.net.limits.entry_rates import EntryRates
from peerd.protocol.connection.connection import ConnectionMachine, Limits
from peerd.protocol.connection.liveness import Delivery
from peerd.protocol.errors import ConnectionLost
from peerd.protocol.identity import Identity, PeerId

# As much as a socket holds: an end that closes must not wait until the other end has read its last messages.
_PIPE_MESSAGES = 16


class LoopbackConnection(PeerConnection):
    """One of the two ends. `peer_id` is our own. The near end, on which we open streams, makes the choice."""

    def __init__(
        self,
        core: ConnectionMachine,
        channel: _Pipe,
        *,
        is_near: bool,
        own: PeerId,
        handlers: Mapping[str, StreamHandler],
        containment: Containment,
    ) -> None:
        super().__init__(
            core,
            channel,
            own=own,
            handlers=handlers,
            containment=containment,
            rates=EntryRates(),
            on_lost=_tell_nobody,
        )
        self._is_near = is_near

    @property
    def peer_id(self) -> PeerId:
        return self._own

    @property
    def is_our_choice(self) -> bool:
        return self._is_near


def loopback(
    own: PeerId,
    handlers: Mapping[str, StreamHandler],
    introduction: Introduction,
    containment: Containment,
    limits: Limits,
) -> tuple[PeerConnection, Callable[[], Awaitable[None]]]:
    """Make the end on which we open streams, and the function that runs both ends. The end is usable after its
    hello.
    """
    there, from_here = trio.open_memory_channel[bytes](_PIPE_MESSAGES)
    here, from_there = trio.open_memory_channel[bytes](_PIPE_MESSAGES)
    now = trio.current_time()
    asks, answers = (
        ConnectionMachine(Identity.generate(), initiator=dials, now=now, limits=limits) for dials in (True, False)
    )
    near = LoopbackConnection(
        asks, _Pipe(there, from_there), is_near=True, own=own, handlers={}, containment=containment
    )
    far = LoopbackConnection(
        answers, _Pipe(here, from_here), is_near=False, own=own, handlers=handlers, containment=containment
    )

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.run, partial(_settle, introduction))
            nursery.start_soon(far.run, partial(_settle, introduction))

    return near, run


async def _settle(introduction: Introduction, connection: PeerConnection) -> None:
    await connection.agreement.proven.wait()
    if await agree(connection, _take):
        connection.agreement.settle()
        connection.agreement.introduce(await exchange_hellos(connection, introduction.hello_to(connection)))


async def _take(_connection: PeerConnection) -> bool:
    await trio.lowlevel.checkpoint()
    return True


def _tell_nobody(_connection: PeerConnection) -> None:
    """Do nothing: observers of connections want to know about other peers only."""


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

    @property
    def remote_port(self) -> int:
        return 0

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

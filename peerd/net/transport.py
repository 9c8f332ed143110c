"""The interface of what carries a connection's messages. Websockets, relays and tests implement it.

A transport moves whole messages in order, and reports when the way is broken. It does not prove the identity of the
other end, and does not encrypt: the handshake inside does both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.liveness import Delivery


class MessageChannel(Protocol):
    """One way to one peer. At most one task sends, and one receives."""

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        """The address at which the other side is seen; None if it is unknown."""

    @property
    def remote_port(self) -> int:
        """The TCP port from which the other side is seen; 0 if it is unknown."""

    async def send(self, message: bytes) -> None:
        """Send one message. Raises ConnectionLost.

        If cancelled, half a message may have been sent: then nothing can be sent any more.
        """

    async def receive(self) -> bytes:
        """The next message. Raises ConnectionLost when the way has ended, and PeerFault for bytes that are no message.

        If cancelled, nothing is lost.
        """

    def delivery(self) -> Delivery | None:
        """What happened to the bytes that were sent, if that is known for the whole way to the other side."""

    async def aclose(self) -> None:
        """End the way. Takes a bounded time, even if cancelled. The other side may still read what was sent."""


class Transport(Protocol):
    """Dials and listens."""

    async def dial(self, address: Multiaddr, tasks: trio.Nursery, policy: DialPolicy = ANYWHERE) -> MessageChannel:
        """Connect to an address, without a time-out. Raises ConnectFailed, VersionMismatch.

        `tasks` holds what the channel needs to run, until it is closed. policy: to which of the IP addresses that the
        address stands for it may connect.
        """

    async def dial_from_own_port(self, address: Multiaddr, tasks: trio.Nursery) -> MessageChannel:
        """Connect to an address from the port on which we listen, or, if we listen on none, from one that stays the
        same.

        So the other side sees where a NAT puts that port. As `dial`, but the address has an IP, and no TLS; and what
        was not sent when the channel is closed is lost.
        """

    def expecting(self, address: Multiaddr) -> AbstractContextManager[object]:
        """Keep a connection that comes from this address during the block for `meet`, which dials it a little later.

        The other side may dial earlier than we do. Where no NAT keeps its connection out, it would be served as any
        other.
        """

    async def meet(self, address: Multiaddr, tasks: trio.Nursery, *, as_server: bool) -> MessageChannel:
        """Connect to a peer that connects to us at this moment, both from their own ports to the other's.

        Two NATs that would let neither side in take the other's first packet for an answer. One side is the server of
        the websocket, and the other its client, whichever side's connection is the one that comes about. Tries until
        it is cancelled, as often as a connection is refused. Raises ConnectFailed, VersionMismatch.
        """

    async def listen(
        self,
        address: Multiaddr,
        handler: Callable[[MessageChannel], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Multiaddr],
    ) -> None:
        """Run `handler` in a task of its own for every channel that comes, until cancelled.

        Started with the address on which it listens: port 0 has been replaced by a real one. Closes the channel when
        the handler returns. Raises OSError if it cannot listen.
        """

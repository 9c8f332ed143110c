"""What carries a connection's messages: the interface that websockets, relays and tests implement.

A transport moves whole messages in order and says when the way is broken. It proves nothing about who is
at the other end (the handshake inside does) and hides nothing: an address in, bytes through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.liveness import Delivery


class MessageChannel(Protocol):
    """One way to one peer. At most one task sends and one receives."""

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        """Where the other side is seen at; None where that cannot be told."""

    async def send(self, message: bytes) -> None:
        """Send one message. Raises ConnectionLost.

        Cancelling it may leave half a message sent: nothing can be sent after that.
        """

    async def receive(self) -> bytes:
        """The next message. Raises ConnectionLost when the way has ended, PeerFault for what is no message.

        Cancelling it loses nothing.
        """

    def delivery(self) -> Delivery | None:
        """What became of what was sent, if that can be told of the whole way to the other side."""

    async def aclose(self) -> None:
        """End the way. Takes a bounded time, even when cancelled; the other side may still read what was sent."""


class Transport(Protocol):
    """Dials and listens."""

    async def dial(self, address: Multiaddr, tasks: trio.Nursery, policy: DialPolicy = ANYWHERE) -> MessageChannel:
        """Connect to an address, without a time-out. Raises ConnectFailed, VersionMismatch.

        `tasks` holds what the channel needs to run, until it is closed. policy: which of the IP addresses that the
        address stands for may be connected to.
        """

    async def listen(
        self,
        address: Multiaddr,
        handler: Callable[[MessageChannel], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Multiaddr],
    ) -> None:
        """Hand every channel that comes to its own `handler` task, until cancelled.

        Started with the address it is bound to: port 0 has become a real one. Closes the channel when the
        handler returns. Raises OSError where it cannot listen.
        """

"""The interface of what carries a connection's messages. Websockets, relays and tests implement it.

A transport moves whole messages in order, and reports when the way is broken. It does not prove the identity of the
other end, and does not encrypt: the handshake inside does both.
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
    """One way to one peer. At most one task sends, and one receives."""

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        """The address at which the other side is seen; None if it is unknown."""

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

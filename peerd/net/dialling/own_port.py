"""The TCP port from which a peer meets peers behind NATs, and the connections that arrive there for such a meeting.

It is the port on which the peer listens, since a NAT that has forwarded a port knows that one; a peer that listens
nowhere keeps the first port that the system gives it. Two sockets share the port, the listener's and the dial's, so
both need SO_REUSEPORT. The listener gets it only after it was bound: so the system still refuses a port on which
another process listens.

When both sides dial, two things can happen. If both sockets have sent their first packet before the other's arrives,
TCP joins them into one connection (RFC 9293, 3.5: simultaneous open). If one side's packet arrives earlier, the other
side's listener accepts it, and that side's own dial fails, as the connection exists. So the listener hands over what
comes from an address that is awaited.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import trio

from peerd.protocol.addresses import IpAddress
from peerd.protocol.errors import ConnectFailed

# The wait before a dial that was refused is repeated, each time twice as long: the other side may not have dialled yet,
# so that its machine, or its NAT, answered for it.
FIRST_PAUSE_S = 0.1
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_ANY_HOST = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class _Abortable(Protocol):
    def abort(self) -> None: ...


Channel = TypeVar("Channel", bound=_Abortable)


@dataclass(frozen=True, slots=True)
class _Awaited(Generic[Channel]):
    sender: trio.MemorySendChannel[Channel]
    receiver: trio.MemoryReceiveChannel[Channel]


class OwnPort(Generic[Channel]):
    """The port of each address family, and the channels that are awaited on it."""

    def __init__(self) -> None:
        self._bound: dict[socket.AddressFamily, tuple[str, int]] = {}
        self._awaited: dict[tuple[IpAddress | None, int], _Awaited[Channel]] = {}

    def __repr__(self) -> str:
        return f"<OwnPort {sorted(port for _, port in self._bound.values())} awaited={len(self._awaited)}>"

    def share(self, listener: trio.socket.SocketType) -> None:
        """Let dials leave from the port of a socket that is bound and listens. The first one of a family counts."""
        if _may_share(listener):
            host, port, *_ = listener.getsockname()
            self._bound.setdefault(socket.AddressFamily(listener.family), (host, port))

    async def connect(self, ip: IpAddress, port: int, *, forgets: bool = False) -> trio.SocketStream:
        """A TCP stream from our own port. Raises OSError.

        forgets: whether the system may forget the stream as soon as it is closed, with whatever was not sent. Otherwise
            it refuses another one between the same two ports for a minute (RFC 9293, 3.3.2: TIME-WAIT).
        """
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        dial = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            if not _may_share(dial):
                raise OSError("this system does not let two sockets share a port")
            # Otherwise connections that ended a moment ago would keep a daemon that restarts from its port.
            dial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                dial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if forgets:
                dial.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            await dial.bind(self._bound.get(family, (_ANY_HOST[family], 0)))
            host, own, *_ = dial.getsockname()
            self._bound.setdefault(family, (host, own))
            await dial.connect((str(ip), port))
            return trio.SocketStream(dial)
        except BaseException:
            dial.close()
            raise

    @contextmanager
    def awaiting(self, ip: IpAddress, port: int) -> Iterator[trio.MemoryReceiveChannel[Channel]]:
        """Receive the channel that a peer opens from this address; one at most. Who comes second is served as others
        are.

        Blocks for the same address may be nested: a channel that came in the outer one is received in the inner one.
        """
        if (outer := self._awaited.get((ip, port))) is not None:
            yield outer.receiver
            return
        here = self._awaited[ip, port] = _Awaited(*trio.open_memory_channel[Channel](1))
        try:
            yield here.receiver
        finally:
            del self._awaited[ip, port]
            with suppress(trio.WouldBlock):
                here.receiver.receive_nowait().abort()

    def hand_over(self, channel: Channel, ip: IpAddress | None, port: int) -> bool:
        """Give a channel that the listener accepted to the task that awaits it. Returns whether there was one."""
        awaited = self._awaited.get((ip, port))
        if awaited is None:
            return False
        try:
            awaited.sender.send_nowait(channel)
        except trio.WouldBlock:
            return False
        return True


async def until_open(dial: Callable[[], Awaitable[Channel]]) -> Channel:
    """Dial again, after ever longer pauses, until a dial does not raise ConnectFailed. A NAT may refuse a connection,
    and may also reset one that was open for a moment.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await dial()
        except ConnectFailed:
            await trio.sleep(pause_s)
            pause_s *= 2


def _may_share(sock: trio.socket.SocketType) -> bool:
    """Allow other sockets of ours on this one's port. Returns False where the system cannot."""
    option = getattr(socket, "SO_REUSEPORT", None)
    if option is None:
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, 1)
    except OSError:
        return False
    return True

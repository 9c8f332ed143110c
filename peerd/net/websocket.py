"""Carries connections in websockets: `ws://` directly, or `wss://` through a proxy that ends TLS for us.

The library trio-websocket implements the protocol. Each websocket has a reader task of the library in a nursery of its
own, so that an exception in it ends only that websocket. If a stranger hangs up in the middle of the upgrade, the
library waits for ever. So the stream beneath it is watched, and its end ends the wait.
"""

from __future__ import annotations

import logging
import ssl
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

import h11
import trio
import wsproto.utilities
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    WebSocketRequest,
    wrap_client_stream,
    wrap_server_stream,
)

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.dialling.names import Names, connect_to_any
from peerd.net.transport import MessageChannel
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import MAX_FRAME_BYTES
from peerd.protocol.connection.liveness import Delivery
from peerd.protocol.connection.noise import TAG_BYTES
from peerd.protocol.errors import ConnectFailed, ConnectionLost, PeerFault, RemoteProtocolError, VersionMismatch

log = logging.getLogger(__name__)

# It names the major version before the handshake does, so that a version mismatch is not mistaken for a wrong key.
SUBPROTOCOL: Final = "peerd.1"
MAX_MESSAGE_BYTES: Final = MAX_FRAME_BYTES + TAG_BYTES
# The library's own 4 KiB make bulk transfers 2 to 5 times slower.
_RECEIVE_BYTES: Final = 64 * 1024
# Between the library's reader and ours, which never waits for anything else.
_QUEUE_MESSAGES: Final = 16
_OPTIONS: Final[dict[str, Any]] = {
    "message_queue_size": _QUEUE_MESSAGES,
    "max_message_size": MAX_MESSAGE_BYTES,
    "receive_buffer_size": _RECEIVE_BYTES,
}
# How long a close may wait for the other side to take our last messages.
_LINGER_S: Final = 0.5
_UPGRADE_REQUIRED = 426
_FORBIDDEN = 403
_TOO_BIG = 1009
# The limit for a peer's HTTP before the websocket is open, and then for what comes before its first message is whole:
# each has a few hundred bytes.
_MAX_UPGRADE_BYTES: Final = 64 * 1024
# The limit for what comes between two whole messages. The library's queue, its buffer and one message that has begun
# take 0.6 MiB. A message may come in any number of empty parts, each of which costs the library as much as a full one.
_MAX_BETWEEN_BYTES: Final = 1024 * 1024
# The exceptions of trio-websocket and the libraries beneath it if the other side breaks a protocol or has gone.
# trio-websocket also answers a PING while it closes, and a malformed answer as if it were the server, which raises too.
_LIBRARY_ERRORS: Final = (
    wsproto.utilities.ProtocolError,
    h11.ProtocolError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    UnicodeError,
)


class WebSocketTransport:
    """Dials and listens on TCP. `ssl_context`: for `wss`; None takes the system's certificates."""

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self._ssl_context = ssl_context
        self._names = Names()

    async def dial(self, address: Multiaddr, tasks: trio.Nursery, policy: DialPolicy = ANYWHERE) -> WebSocketChannel:
        """Connect and upgrade, without a time-out. Raises ConnectFailed, VersionMismatch."""
        if address.relay is not None or not address.is_dialable:
            raise ConnectFailed(f"{address} cannot be dialled directly")
        try:
            stream = await self._connect(address, policy)
        except (OSError, trio.BrokenResourceError) as error:
            raise ConnectFailed(_cause(error)) from error
        try:
            channel = WebSocketChannel(stream)
        except OSError as error:
            # The process that accepted the connection was killed at that moment.
            await trio.aclose_forcefully(stream)
            raise ConnectFailed(_cause(error)) from error
        readers = await tasks.start(channel.host)
        try:
            await channel.request(readers, address)
        except BaseException as error:
            channel.abort()
            if isinstance(error, ConnectionLost | RemoteProtocolError):
                raise ConnectFailed(str(error)) from error
            raise
        return channel

    async def listen(
        self,
        address: Multiaddr,
        handler: Callable[[MessageChannel], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Multiaddr],
    ) -> None:
        """Serve websockets on a TCP address until cancelled. Raises OSError. TLS must be ended by a proxy."""
        if address.secure:
            raise OSError(f"cannot listen on {address}: let a proxy end TLS, and listen on ws behind it")
        if address.ip is None:
            raise OSError(f"cannot listen on {address}: listen on an IP address, names are for dialling")
        [listener] = await trio.open_tcp_listeners(address.port, host=address.host)
        port = listener.socket.getsockname()[1]
        bound = Multiaddr(address.kind, address.host, port, peer_id=address.peer_id)
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, partial(_serve, handler), [listener])
            task_status.started(bound)

    async def _connect(self, address: Multiaddr, policy: DialPolicy) -> trio.abc.Stream:
        # Connect to an IP address that the policy has seen: a second lookup of a name may give another one.
        stream = await connect_to_any(await self._names.permitted(address, policy), address.port)
        if not address.secure:
            return stream
        try:
            context = self._ssl_context or ssl.create_default_context()
            secured = trio.SSLStream(stream, context, server_hostname=address.host, https_compatible=True)
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return secured


async def _serve(handler: Callable[[MessageChannel], Awaitable[None]], stream: trio.SocketStream) -> None:
    try:
        channel = WebSocketChannel(stream)
    except OSError:
        # The other side was gone before we could read its address.
        return
    async with trio.open_nursery() as nursery:
        channel.readers = await nursery.start(channel.host)
        try:
            await handler(channel)
        finally:
            await channel.aclose()


class WebSocketChannel:
    """A MessageChannel over one websocket. A server's side upgrades at its first `receive`.

    Raises OSError for a stream that the other side has reset already.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        # The nursery in which a server's side upgrades; None on a client's side.
        self.readers: trio.Nursery | None = None
        self._stream = stream
        self._websocket: WebSocketConnection | None = None
        self._opening = trio.CancelScope()
        self._closed = trio.Event()
        self._failure: BaseException | None = None
        # Whether the websocket is open, plus how many messages were received since.
        self._progress = 0
        self._remote_ip = _remote_ip(stream)

    def __repr__(self) -> str:
        return f"<WebSocketChannel {self._remote_ip} {self._websocket or 'opening'}>"

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        return self._remote_ip

    async def host(self, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """Own the nursery of the library's reader until the channel is closed.

        An exception in the reader ends only this channel, because a stranger's bytes caused it.
        """
        try:
            async with trio.open_nursery() as nursery:
                task_status.started(nursery)
                await self._closed.wait()
                nursery.cancel_scope.cancel()
        except* Exception as group:
            self._failure = group.exceptions[0]
            log.debug("the websocket of %s ends: %r", self._remote_ip, self._failure)
        finally:
            self._opening.cancel()
            await trio.aclose_forcefully(self._stream)

    async def request(self, readers: trio.Nursery, address: Multiaddr) -> None:
        """Upgrade a client's side. Raises ConnectionLost, VersionMismatch."""
        host = f"[{address.host}]" if address.kind == "ip6" else address.host
        with self._opening, _as_lost():
            self._websocket = await wrap_client_stream(
                readers, self._watched(), f"{host}:{address.port}", "/", subprotocols=[SUBPROTOCOL], **_OPTIONS
            )
        if isinstance(self._failure, ConnectionRejected):
            status = self._failure.status_code
            if status == _UPGRADE_REQUIRED:
                raise VersionMismatch(f"the other side does not speak {SUBPROTOCOL}")
            raise ConnectionLost(f"refused with HTTP status {status}")
        if self._websocket is None:
            raise ConnectionLost(f"no websocket: {self._failure or 'the other side hung up before it was one'}")
        self._progress = 1
        if self._websocket.subprotocol != SUBPROTOCOL:
            raise VersionMismatch(f"the other side chose {self._websocket.subprotocol!r}, not {SUBPROTOCOL!r}")

    async def send(self, message: bytes) -> None:
        if self._websocket is None:
            raise ConnectionLost("the websocket is not open")
        with _as_lost():
            await self._websocket.send_message(message)

    async def receive(self) -> bytes:
        if self._websocket is None:
            self._websocket = await self._upgrade()
        with _as_lost():
            message = await self._websocket.get_message()
        self._progress += 1
        if isinstance(message, str):
            raise RemoteProtocolError("a text message on a binary protocol")
        # The library returns a message that came in several parts as a bytearray.
        return bytes(message)

    def delivery(self) -> Delivery | None:
        # Behind TLS there is a proxy, so our system does not see the rest of the way.
        return delivery_of(self._stream.socket) if isinstance(self._stream, trio.SocketStream) else None

    def abort(self) -> None:
        """End the channel at once, without a closing message."""
        self._closed.set()

    async def aclose(self) -> None:
        """Send a closing message and let the other side read what was sent, for at most half a second."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LINGER_S):
            if self._websocket is not None:
                try:
                    await self._websocket.aclose()
                except Exception as error:
                    # Whatever the library meets in a stranger's last words ends this channel, which has ended anyway.
                    log.debug("the websocket of %s did not close: %r", self._remote_ip, error)
        self.abort()
        await trio.aclose_forcefully(self._stream)

    async def _upgrade(self) -> WebSocketConnection:
        """Upgrade a server's side. Requests from web pages are refused, whatever protocol they name."""
        if self.readers is None:
            raise ConnectionLost("the websocket is closed")
        request: WebSocketRequest | None = None
        with self._opening, _as_lost():
            request = await wrap_server_stream(self.readers, self._watched(), **_OPTIONS)
        if request is None:
            raise PeerFault(f"no websocket: {self._failure or 'the other side hung up or spoke no HTTP'}")
        with _as_lost():
            if any(name.lower() == b"origin" for name, _ in request.headers):
                await self._reject(request, _FORBIDDEN, "web pages cannot be peers")
            if SUBPROTOCOL not in request.proposed_subprotocols:
                await self._reject(request, _UPGRADE_REQUIRED, f"this is a peer that speaks {SUBPROTOCOL}")
            websocket = await request.accept(subprotocol=SUBPROTOCOL)
        self._progress = 1
        return websocket

    @staticmethod
    async def _reject(request: WebSocketRequest, status: int, reason: str) -> None:
        headers = [(b"content-type", b"text/plain")]
        await request.reject(status, extra_headers=headers, body=f"{reason}\n".encode())
        raise PeerFault(f"refused a websocket: {reason}")

    def _watched(self) -> Any:
        return _WatchedStream(self._stream, self._opening.cancel, lambda: self._progress)


class _WatchedStream(trio.abc.Stream):
    """A stream that reports its end, which trio-websocket does not tell the task that waits for the upgrade.

    It ends where too many bytes come without progress: `progress` grows when the websocket opens and with each message.
    The library would keep the whole body of a refusal, and read empty parts of one message for ever.
    """

    def __init__(self, stream: trio.abc.Stream, on_end: Callable[[], None], progress: Callable[[], int]) -> None:
        self._stream = stream
        self._on_end = on_end
        self._progress = progress
        self._last_progress = 0
        self._bytes = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._on_end()
            raise
        progress = self._progress()
        if progress != self._last_progress:
            self._last_progress, self._bytes = progress, 0
        self._bytes += len(data)
        if self._bytes > (_MAX_UPGRADE_BYTES if progress <= 1 else _MAX_BETWEEN_BYTES):
            self._on_end()
            return b""
        if not data:
            self._on_end()
        return data

    async def aclose(self) -> None:
        self._on_end()
        await self._stream.aclose()


@contextmanager
def _as_lost() -> Iterator[None]:
    """Inside this context, turn the libraries' exceptions into ConnectionLost or RemoteProtocolError."""
    try:
        yield
    except ConnectionClosed as closed:
        raise _lost(closed) from None
    except _LIBRARY_ERRORS as error:
        raise ConnectionLost(f"the websocket broke: {error!r}") from error


def _lost(closed: ConnectionClosed) -> PeerFault:
    reason = closed.reason
    if reason is None or reason.code is None:
        return ConnectionLost("the connection broke")
    if reason.code == _TOO_BIG:
        return RemoteProtocolError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
    return ConnectionLost(f"the websocket was closed ({reason.code})")


def _remote_ip(stream: trio.abc.Stream) -> IPv4Address | IPv6Address | None:
    inner = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    if not isinstance(inner, trio.SocketStream):
        return None
    host, *_ = inner.socket.getpeername()
    ip = ip_address(host.partition("%")[0])
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def _cause(error: Exception) -> str:
    """Why a connection could not be made, in the system's words. Of several addresses, for the first."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)


# tcpi_retransmits and tcpi_probes, counted since the last acknowledgement; tcpi_bytes_acked (Linux 4.1).
_FIELDS = struct.Struct("@2xBB116xQ")


def delivery_of(socket: trio.socket.SocketType) -> Delivery | None:
    """What happened to the bytes sent on a TCP socket; None if the system does not say, or the socket is closed."""
    if sys.platform != "linux":
        return None
    try:
        info = socket.getsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_INFO, _FIELDS.size)
    except OSError:
        return None
    if len(info) < _FIELDS.size:
        return None
    retransmits, probes, acknowledged_bytes = _FIELDS.unpack(info)
    return Delivery(acknowledged_bytes, max(retransmits, probes))

"""One websocket that carries a connection's messages, from the upgrade to the close, on either side.

The library trio-websocket implements the protocol. Each websocket has a reader task of the library in a nursery of its
own, so that an exception in it ends only that websocket. If a stranger hangs up in the middle of the upgrade, the
library waits for ever. So the stream beneath it is watched (`watched_stream`), and its end ends the wait.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
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

from peerd.net.websockets.tcp import delivery_of, remote
from peerd.net.websockets.watched_stream import WatchedStream
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import MAX_FRAME_BYTES
from peerd.protocol.connection.liveness import Delivery
from peerd.protocol.connection.noise import TAG_BYTES
from peerd.protocol.errors import ConnectionLost, PeerFault, RemoteProtocolError, VersionMismatch

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
# The exceptions of trio-websocket and the libraries beneath it if the other side breaks a protocol or has gone.
# trio-websocket also answers a PING while it closes, and a malformed answer as if it were the server, which raises too.
_LIBRARY_ERRORS: Final = (
    wsproto.utilities.ProtocolError,
    h11.ProtocolError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    UnicodeError,
)


class WebSocketChannel:
    """A MessageChannel over one websocket. A server's side upgrades at its first `receive`.

    Raises OSError for a stream that the other side has reset already.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        # The nursery in which the library's reader runs; None before `host` has started.
        self.readers: trio.Nursery | None = None
        self._stream = stream
        self._websocket: WebSocketConnection | None = None
        self._opening = trio.CancelScope()
        self._closed = trio.Event()
        self._failure: BaseException | None = None
        # Whether the websocket is open, plus how many messages were received since.
        self._progress = 0
        self._remote_ip, self._remote_port = remote(stream)

    def __repr__(self) -> str:
        return f"<WebSocketChannel {self._remote_ip} {self._websocket or 'opening'}>"

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        return self._remote_ip

    @property
    def remote_port(self) -> int:
        return self._remote_port

    async def wait_closed(self) -> None:
        """Wait until `abort` or `aclose` ends the channel."""
        await self._closed.wait()

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

    async def request(self, address: Multiaddr) -> None:
        """Upgrade a client's side. Raises ConnectionLost, VersionMismatch."""
        if self.readers is None:
            raise ConnectionLost("the websocket is closed")
        host = f"[{address.host}]" if address.kind == "ip6" else address.host
        with self._opening, _as_lost():
            self._websocket = await wrap_client_stream(
                self.readers, self._watched(), f"{host}:{address.port}", "/", subprotocols=[SUBPROTOCOL], **_OPTIONS
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
        return WatchedStream(self._stream, self._opening.cancel, lambda: self._progress)


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

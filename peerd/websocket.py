"""Carries connections in websockets, `ws://` directly or `wss://` through a proxy that ends TLS for us.

Glues wsproto to Trio's streams: no task of its own, so a message passes from the socket to its reader
without a switch between. The difficulty is never to send from the reading side: two peers that each
wait for the other to read would wait for ever. So a websocket ping is answered with our next message.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError as CannotSend
from wsproto.utilities import RemoteProtocolError as BrokenWebsocket

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, ConnectionLost, PeerFault, RemoteProtocolError, VersionMismatch
from peerd.protocol.frames import MAX_FRAME_BYTES
from peerd.protocol.noise import TAG_BYTES
from peerd.transport import MessageChannel

# Names the major version before the handshake binds it, so that a mismatch can be told from a wrong key.
SUBPROTOCOL: Final = "peerd.1"
MAX_MESSAGE_BYTES: Final = MAX_FRAME_BYTES + TAG_BYTES
# Small reads make bulk 2-5 times slower.
_RECEIVE_BYTES: Final = 64 * 1024
# How long a close may wait for the other side to take our last words.
_LINGER_S: Final = 0.5
_FAMILIES: Final = {"dns4": trio.socket.AF_INET, "dns6": trio.socket.AF_INET6}
_UPGRADE_REQUIRED = 426
_FORBIDDEN = 403


class WebSocketTransport:
    """Dials and listens on TCP. `ssl_context`: for `wss`, None for the system's certificates."""

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self._ssl_context = ssl_context

    async def dial(self, address: Multiaddr) -> WebSocketChannel:
        """Connect and upgrade, without a time-out. Raises ConnectFailed, VersionMismatch."""
        if address.relay is not None or not address.is_dialable:
            raise ConnectFailed(f"{address} cannot be dialled directly")
        try:
            stream = await self._connect(address)
        except (OSError, trio.BrokenResourceError) as error:
            raise ConnectFailed(_cause(error)) from error
        channel = WebSocketChannel(stream, WSConnection(ConnectionType.CLIENT))
        try:
            await channel.request(address)
        except BaseException as error:
            await trio.aclose_forcefully(stream)
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
        """Serve websockets on a TCP address until cancelled. Raises OSError. TLS is a proxy's business."""
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

    async def _connect(self, address: Multiaddr) -> trio.abc.Stream:
        stream = await trio.open_tcp_stream(await _host(address), address.port)
        if not address.secure:
            return stream
        context = self._ssl_context or ssl.create_default_context()
        secured = trio.SSLStream(stream, context, server_hostname=address.host, https_compatible=True)
        try:
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(secured)
            raise
        return secured


async def _host(address: Multiaddr) -> str:
    """What to connect to: a `dns4` or `dns6` name's first address of that family, else the host itself."""
    family = _FAMILIES.get(address.kind)
    if family is None:
        return address.host
    found = await trio.socket.getaddrinfo(address.host, address.port, family=family, type=trio.socket.SOCK_STREAM)
    return str(found[0][4][0])


async def _serve(handler: Callable[[MessageChannel], Awaitable[None]], stream: trio.SocketStream) -> None:
    try:
        channel = WebSocketChannel(stream, WSConnection(ConnectionType.SERVER))
    except OSError:
        # It was gone before we looked who it was.
        return
    try:
        await handler(channel)
    finally:
        await channel.aclose()


class WebSocketChannel:
    """A MessageChannel over one websocket. A server's side upgrades at its first `receive`."""

    def __init__(self, stream: trio.abc.Stream, websocket: WSConnection) -> None:
        self._stream = stream
        self._websocket = websocket
        self._parts: list[bytes] = []
        self._size = 0
        self._pongs = b""
        self._broken = False
        self._remote_ip = _remote_ip(stream)

    def __repr__(self) -> str:
        return f"<WebSocketChannel {self._remote_ip} {self._websocket.state.name}>"

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        return self._remote_ip

    async def request(self, address: Multiaddr) -> None:
        """Upgrade a client's side. Raises ConnectionLost, RemoteProtocolError, VersionMismatch."""
        host = f"[{address.host}]" if address.kind == "ip6" else address.host
        request = Request(host=f"{host}:{address.port}", target="/", subprotocols=[SUBPROTOCOL])
        await self._send(self._websocket.send(request))
        while True:
            for event in self._websocket.events():
                match event:
                    case AcceptConnection(subprotocol=chosen):
                        if chosen != SUBPROTOCOL:
                            raise VersionMismatch(f"the other side chose {chosen!r}, not {SUBPROTOCOL!r}")
                        return
                    case RejectConnection(status_code=status):
                        if status == _UPGRADE_REQUIRED:
                            raise VersionMismatch(f"the other side does not speak {SUBPROTOCOL}")
                        raise ConnectionLost(f"refused with HTTP status {status}")
            await self._read()

    async def send(self, message: bytes) -> None:
        pongs, self._pongs = self._pongs, b""
        try:
            data = self._websocket.send(BytesMessage(data=message))
        except CannotSend:
            raise ConnectionLost("the websocket is closed") from None
        await self._send(pongs + data)

    async def receive(self) -> bytes:
        while True:
            for event in self._websocket.events():
                match event:
                    case BytesMessage():
                        message = self._join(event)
                        if message is not None:
                            return message
                    case Request():
                        await self._accept(event)
                    case Ping():
                        # A flood of pings costs one answer.
                        self._pongs = self._websocket.send(event.response())
                    case CloseConnection(code=code):
                        raise ConnectionLost(f"the peer closed the websocket ({int(code)})")
                    case TextMessage():
                        raise RemoteProtocolError("a text message on a binary protocol")
                    case Pong():
                        pass
            await self._read()

    async def aclose(self) -> None:
        """Say goodbye and let the other side read what was sent, for half a second at most."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LINGER_S):
            if not self._broken:
                with suppress(ConnectionLost, CannotSend):
                    await self._send(self._websocket.send(CloseConnection(code=1000)))
                    await self._drain()
        await trio.aclose_forcefully(self._stream)

    async def _drain(self) -> None:
        """Read on until the other side has closed: closing with unread bytes would destroy our last words."""
        if isinstance(self._stream, trio.SocketStream):
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._stream.send_eof()
                while await self._stream.receive_some(_RECEIVE_BYTES):
                    pass

    async def _send(self, data: bytes) -> None:
        broken, self._broken = self._broken, True
        try:
            if broken:
                raise ConnectionLost("half a message was sent: the websocket is broken")
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(f"the connection broke: {_cause(error)}") from error
        self._broken = False

    async def _read(self) -> None:
        try:
            data = await self._stream.receive_some(_RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(f"the connection broke: {_cause(error)}") from error
        if not data:
            raise ConnectionLost("the peer closed the connection")
        try:
            self._websocket.receive_data(bytes(data))
        # A header that is not ASCII is a UnicodeError, which wsproto lets through.
        except (BrokenWebsocket, UnicodeError) as error:
            raise RemoteProtocolError(f"no websocket: {error}") from None

    def _join(self, event: BytesMessage) -> bytes | None:
        """The message, once its last part is here."""
        self._size += len(event.data)
        if self._size > MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        if event.data:
            self._parts.append(bytes(event.data))
        if not event.message_finished:
            return None
        message = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        self._size = 0
        return message

    async def _accept(self, request: Request) -> None:
        """Upgrade a server's side. A browser's page has no business here, whatever it claims to speak."""
        if any(name.lower() == b"origin" for name, _ in request.extra_headers):
            await self._reject(_FORBIDDEN, b"peers do not come from web pages\n")
        if SUBPROTOCOL not in request.subprotocols:
            await self._reject(_UPGRADE_REQUIRED, f"this is a peer that speaks {SUBPROTOCOL}\n".encode())
        await self._send(self._websocket.send(AcceptConnection(subprotocol=SUBPROTOCOL)))

    async def _reject(self, status: int, reason: bytes) -> None:
        headers = [(b"content-length", str(len(reason)).encode()), (b"content-type", b"text/plain")]
        response = self._websocket.send(RejectConnection(status_code=status, headers=headers, has_body=True))
        await self._send(response + self._websocket.send(RejectData(data=reason)))
        raise PeerFault(f"refused a websocket: {reason.decode().strip()}")


def _remote_ip(stream: trio.abc.Stream) -> IPv4Address | IPv6Address | None:
    inner = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    if not isinstance(inner, trio.SocketStream):
        return None
    host, *_ = inner.socket.getpeername()
    ip = ip_address(host.partition("%")[0])
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def _cause(error: Exception) -> str:
    return str(error.__cause__ or error)

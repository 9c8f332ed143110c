"""Dials and listens on TCP: `ws://` directly, or `wss://` through a proxy that ends TLS for us."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.dialling.names import Names, connect_to_any
from peerd.net.transport import MessageChannel
from peerd.net.websockets.channel import WebSocketChannel
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, ConnectionLost, RemoteProtocolError


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


def _cause(error: Exception) -> str:
    """Why a connection could not be made, in the system's words. Of several addresses, for the first."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)

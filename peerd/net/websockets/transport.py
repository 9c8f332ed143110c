"""Dials and listens on TCP: `ws://` directly, or `wss://` through a proxy that ends TLS for us."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.dialling.names import Names, connect_to_any
from peerd.net.dialling.own_port import OwnPort, until_open
from peerd.net.transport import MessageChannel
from peerd.net.websockets.channel import WebSocketChannel
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, ConnectionLost, RemoteProtocolError


class WebSocketTransport:
    """Dials and listens on TCP. `ssl_context`: for `wss`; None takes the system's certificates."""

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self._ssl_context = ssl_context
        self._names = Names()
        self._own_port: OwnPort[WebSocketChannel] = OwnPort()

    async def dial(self, address: Multiaddr, tasks: trio.Nursery, policy: DialPolicy = ANYWHERE) -> WebSocketChannel:
        """Connect and upgrade, without a time-out. Raises ConnectFailed, VersionMismatch."""
        if address.relay is not None or not address.is_dialable:
            raise ConnectFailed(f"{address} cannot be dialled directly")
        channel = await _hosted(partial(self._connect, address, policy), tasks)
        await _request(channel, address)
        return channel

    async def dial_from_own_port(self, address: Multiaddr, tasks: trio.Nursery) -> WebSocketChannel:
        """Connect and upgrade from the port on which we listen; see `Transport.dial_from_own_port`."""
        if address.ip is None or address.secure:
            raise ConnectFailed(f"{address} cannot be dialled from our own port")
        connect = partial(self._own_port.connect, address.ip, address.port, forgets=True)
        channel = await _hosted(connect, tasks)
        await _request(channel, address)
        return channel

    def expecting(self, address: Multiaddr) -> AbstractContextManager[object]:
        """Keep what comes from an address for `meet`; see `Transport.expecting`."""
        assert address.ip is not None
        return self._own_port.awaiting(address.ip, address.port)

    async def meet(self, address: Multiaddr, tasks: trio.Nursery, *, as_server: bool) -> WebSocketChannel:
        """Connect to a peer that connects to us at this moment; see `Transport.meet`."""
        ip = address.ip
        assert ip is not None
        dial = partial(self._own_port.connect, ip, address.port)
        met: list[WebSocketChannel] = []
        with self._own_port.awaiting(ip, address.port) as accepted:
            try:
                async with trio.open_nursery() as nursery:

                    async def accept() -> None:
                        met.append(await accepted.receive())
                        nursery.cancel_scope.cancel()

                    async def connect() -> None:
                        met.append(await until_open(partial(_hosted, dial, tasks)))
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(accept)
                    nursery.start_soon(connect)
            except BaseException:
                _abort(met)
                raise
            _abort(met[1:])
        if not as_server:
            await _request(met[0], address)
        return met[0]

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
        self._own_port.share(listener.socket)
        port = listener.socket.getsockname()[1]
        bound = Multiaddr(address.kind, address.host, port, peer_id=address.peer_id)
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, partial(_serve, self._own_port, handler), [listener])
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


def _abort(channels: Iterable[WebSocketChannel]) -> None:
    for channel in channels:
        channel.abort()


async def _hosted(connect: Callable[[], Awaitable[trio.abc.Stream]], tasks: trio.Nursery) -> WebSocketChannel:
    """A channel over a new stream, whose reader runs in `tasks`. Raises ConnectFailed."""
    try:
        stream = await connect()
    except (OSError, trio.BrokenResourceError) as error:
        raise ConnectFailed(_cause(error)) from error
    try:
        channel = WebSocketChannel(stream)
        channel.readers = await tasks.start(channel.host)
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, OSError):
            # The process that accepted the connection was killed at that moment.
            raise ConnectFailed(_cause(error)) from error
        raise
    return channel


async def _request(channel: WebSocketChannel, address: Multiaddr) -> None:
    """Upgrade a client's side. Raises ConnectFailed, VersionMismatch; the channel is closed then."""
    try:
        await channel.request(address)
    except BaseException as error:
        channel.abort()
        if isinstance(error, ConnectionLost | RemoteProtocolError):
            raise ConnectFailed(str(error)) from error
        raise


async def _serve(
    own_port: OwnPort[WebSocketChannel],
    handler: Callable[[MessageChannel], Awaitable[None]],
    stream: trio.SocketStream,
) -> None:
    try:
        channel = WebSocketChannel(stream)
    except OSError:
        # The other side was gone before we could read its address.
        return
    async with trio.open_nursery() as nursery:
        channel.readers = await nursery.start(channel.host)
        try:
            if own_port.hand_over(channel, channel.remote_ip, channel.remote_port):
                await channel.wait_closed()
            else:
                await handler(channel)
        finally:
            await channel.aclose()


def _cause(error: Exception) -> str:
    """Why a connection could not be made, in the system's words. Of several addresses, for the first."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if not isinstance(cause, OSError) or cause.errno is None:
        return str(cause)
    # These have numbers of their own.
    if isinstance(cause, ssl.SSLError | socket.gaierror):
        return cause.strerror or str(cause)
    # Trio puts the address in front of the system's words, in Python's form.
    return os.strerror(cause.errno)

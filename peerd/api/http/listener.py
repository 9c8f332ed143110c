"""Accepts the connections of the local API, within a bound.

Anybody on the machine can open connections to a port without knowing the token. So when there are too many, the one
that has been idle for longest makes room for a new one; a connection with a request is never closed for another.
"""

from __future__ import annotations

import errno
import json
import logging
from contextlib import suppress
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import parse_socket_addr, wrap_app
from starlette.types import ASGIApp

from peerd.api.errors import ApiError
from peerd.api.http.connection import Connection
from peerd.local.messages import MAX_BODY_BYTES
from peerd.net.containment import Containment
from peerd.protocol.encoding.wire import MAX_HEADER_BYTES

log = logging.getLogger(__name__)

# What `accept` raises if this process, or the system, has no descriptor or memory left.
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# Before `accept` is tried again; and how often the log says so.
_PAUSE_S = 0.1
_SAY_EVERY_S = 60.0
_FULL = ApiError(
    503,
    "this daemon has too many connections: close some, or try again",
    code="too_many_connections",
    kind="server_error",
)


class HttpListener:
    """Serves `app` on a listener. `most`: how many connections there may be at a time."""

    def __init__(self, app: ASGIApp, containment: Containment, most: int) -> None:
        self._config = _config()
        self._app: Any = wrap_app(app, self._config.wsgi_max_body_size, "asgi")  # type: ignore[arg-type]
        self._containment = containment
        self._context = WorkerContext(None)
        self._most = most
        self._connections: set[Connection] = set()
        self._said_at = -_SAY_EVERY_S

    def __repr__(self) -> str:
        return f"<HttpListener connections={len(self._connections)}/{self._most}>"

    async def serve(self, listener: trio.abc.Listener[trio.SocketStream]) -> None:
        """Accept connections until cancelled, which cuts off those that are open."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in _NO_ROOM:
                        raise
                    self._make_room()
                    self._say(f"the local API cannot accept connections: {error.strerror}")
                    await trio.sleep(_PAUSE_S)
                    continue
                if len(self._connections) < self._most or self._make_room():
                    nursery.start_soon(self._serve, stream)
                else:
                    self._say(f"the local API has {self._most} connections with requests, and refuses more")
                    nursery.start_soon(_refuse, stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        with self._containment.around("the local API"):
            try:
                peer, own = stream.socket.getpeername(), stream.socket.getsockname()
            except OSError:
                # The client has gone already.
                await trio.aclose_forcefully(stream)
                return
            family = stream.socket.family
            client, server = parse_socket_addr(family, peer), parse_socket_addr(family, own)
            connection = Connection(self._app, self._config, self._context, stream, client, server)
            self._connections.add(connection)
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)

    def _make_room(self) -> bool:
        """End the connection that has been idle for longest. Returns False if none is idle."""
        idle = [(each.idle_since, each) for each in self._connections if each.idle_since is not None]
        if not idle:
            return False
        _, longest = min(idle, key=lambda item: item[0])
        # Another newcomer, at this same moment, needs the place of another one.
        self._connections.discard(longest)
        longest.end()
        return True

    def _say(self, problem: str) -> None:
        if trio.current_time() - self._said_at >= _SAY_EVERY_S:
            self._said_at = trio.current_time()
            log.warning("%s (said at most once in %g s)", problem, _SAY_EVERY_S)


async def _refuse(stream: trio.SocketStream) -> None:
    body = json.dumps(_FULL.body).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with trio.move_on_after(1), suppress(trio.BrokenResourceError):
        await stream.send_all(head.encode() + body)
    await trio.aclose_forcefully(stream)


def _config() -> Config:
    config = Config()
    config.errorlog = logging.getLogger("peerd.api.http")
    config.accesslog = None
    config.include_server_header = False
    config.websocket_max_message_size = MAX_BODY_BYTES + MAX_HEADER_BYTES + 8
    return config

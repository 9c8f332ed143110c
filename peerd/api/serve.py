"""Opens the local API: sockets, guard, application, and the HTTP server that runs them."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.api.app import Api
from peerd.api.guard import Admission, Guard
from peerd.api.http.catch_all import CatchAll
from peerd.api.http.listener import HttpListener
from peerd.api.http.request_log import RequestLog
from peerd.api.metrics.collector import Figures
from peerd.api.metrics.endpoint import MetricsEndpoint
from peerd.api.models import Models
from peerd.api.openai.answering import Answering
from peerd.api.openai.chat_templates import open_chat_templates
from peerd.api.sockets import listen_tcp, listen_unix
from peerd.api.status import Status
from peerd.api.web.history import History
from peerd.api.web.invitations import InvitationsApi
from peerd.api.web.swarm import SwarmView
from peerd.net.containment import Containment
from peerd.net.limits.gate import descriptor_limit, local_connections
from peerd.protocol.errors import InvalidRequest
from peerd.trio_tools import open_tasks

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from peerd.client.model import SwarmModel
    from peerd.peer import Peer

_TOKEN_BYTES = 32
_LEAST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen. If `token` is None, no token is needed; `token_file` is where it lies, for messages.

    names, origins: hosts by which the port may be called, and origins of pages that may use it, beside its own.
    """

    socket_path: Path | None = None
    host: str | None = None
    port: int = 0
    token: str | None = None
    token_file: Path | None = None
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LocalApi:
    """A running API. `urls` are for people: `unix:PATH`, `http://HOST:PORT`. `token`: the token that TCP needs, or
    None. `answering`: the answers that it gives, to be drained before it is closed.
    """

    urls: tuple[str, ...]
    token: str | None
    answering: Answering


@asynccontextmanager
async def open_local_api(peer: Peer, models: Mapping[str, SwarmModel], endpoint: Endpoint) -> AsyncIterator[LocalApi]:
    """Serve the local API until the block ends, which cuts off running requests. Raises InvalidRequest."""
    async with AsyncExitStack() as stack:
        templates = await stack.enter_async_context(open_chat_templates())
        offered = Models(models)
        history = History()
        swarm = SwarmView(peer, offered, history)
        containment = peer.connections.containment
        answering = Answering()
        api = Api(offered, templates, Status(peer, offered), swarm, history, answering)
        figures = MetricsEndpoint(Figures(peer, offered, history, answering))
        invitations = InvitationsApi(peer, offered)
        app = CatchAll(api.app(*figures.routes(), *invitations.routes()), containment)
        tasks = await stack.enter_async_context(open_tasks())
        keep = partial(containment.keep_running, what="the history of coverage")
        tasks.start_soon(keep, history.run, swarm.coverage)
        urls = []
        if endpoint.socket_path is not None:
            listener = stack.enter_context(listen_unix(endpoint.socket_path))
            await tasks.start(_serve, RequestLog(Guard(app, Admission())), listener, containment)
            urls.append(f"unix:{endpoint.socket_path}")
        if endpoint.host is not None:
            listener = stack.enter_context(listen_tcp(endpoint.host, endpoint.port))
            names = {endpoint.host, socket.gethostname(), *endpoint.names}
            admission = Admission(endpoint.token, endpoint.token_file, frozenset(names), frozenset(endpoint.origins))
            await tasks.start(_serve, RequestLog(Guard(app, admission)), listener, containment)
            host, port = listener.getsockname()[:2]
            urls.append(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        yield LocalApi(tuple(urls), endpoint.token, answering)


def load_or_create_token(path: Path) -> str:
    """The token in a file that only its owner can read; the file is created if it is missing. Raises InvalidRequest."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(f"{secrets.token_urlsafe(_TOKEN_BYTES)}\n")
        except OSError:
            path.unlink()
            raise
    except FileExistsError:
        pass
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}; choose another --token-file") from None
    try:
        token = path.read_text(errors="replace").strip()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}; choose another --token-file") from None
    if len(token) < _LEAST_TOKEN:
        raise InvalidRequest(f"{path} holds no token of at least {_LEAST_TOKEN} characters: remove it for a new one")
    return token


async def _serve(
    app: ASGIApp, listener: socket.socket, containment: Containment, *, task_status: trio.TaskStatus[None]
) -> None:
    listener.setblocking(False)
    async with trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup())) as accepting:
        task_status.started()
        await HttpListener(app, containment, local_connections(descriptor_limit())).serve(accepting)

"""A peer: its identity, its connections, what it serves and what it uses, under one owner.

`open_peer` wires the rooms together and owns the nursery that everything of a peer runs in; what each part
does is its own business. The difficulty is the order of endings: announcements go offline while
connections still live, connections close before the sessions whose streams they carry, and a caller's
exception comes out of here as it went in.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import trio

from peerd.connections import Connections, open_connections
from peerd.discovery import Discovery, open_discovery
from peerd.nurseries import open_tasks
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.transport import Transport

if TYPE_CHECKING:
    from peerd.model import RemoteModel
    from peerd.server import Server, ServedSpan
    from peerd.serving import ServeSpec

log = logging.getLogger(__name__)

DEFAULT_LISTEN = Multiaddr.parse("/ip4/0.0.0.0/tcp/0/ws")


class Peer:
    """One peer, made by `open_peer`. Its parts are its attributes."""

    def __init__(
        self,
        identity: Identity,
        connections: Connections,
        discovery: Discovery,
        tasks: trio.Nursery,
        announce: Sequence[Multiaddr],
        now: Callable[[], float],
    ) -> None:
        self.identity = identity
        self.connections = connections
        self.discovery = discovery
        self.server: Server | None = None
        self._tasks = tasks
        self._announce = tuple(announce)
        self._now = now

"""Joins the DHT, and joins it again after this peer lost all its connections.

A swarm whose bootstrap peers sleep has to be joined as soon as one of them wakes, so attempts go on, ever more seldom.
A peer that lost all connections at once is looked for by nobody: it has to look for the others itself.
"""

from __future__ import annotations

import logging
from random import Random

import trio

from peerd.net.connections import Connections, PeerConnection
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.table import Contact

log = logging.getLogger(__name__)

# Between attempts to join while nobody answers.
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0


class Joining:
    """Keeps this peer in the DHT."""

    def __init__(self, connections: Connections, dht: Dht, random: Random) -> None:
        self._connections = connections
        self._dht = dht
        self._random = random
        self._alone = trio.Event()

    async def join(self, contacts: list[Contact], tried: trio.Event) -> None:
        """Try until a contact answers, ever more seldom. `tried` is set after the first attempt."""
        retry_s = FIRST_RETRY_S
        while contacts and not await self._dht.bootstrap(contacts):
            if not tried.is_set():
                log.warning("none of the %d known peers answers; trying again", len(contacts))
            tried.set()
            await trio.sleep(retry_s * self._random.uniform(0.8, 1.2))
            retry_s = min(2 * retry_s, MAX_RETRY_S)
        tried.set()

    def note_lost(self, _connection: PeerConnection) -> None:
        """A connection was lost."""
        if not self._connections.live:
            self._alone.set()

    async def come_back(self) -> None:
        """Whenever the last connection was lost, look for the peers that we knew until one answers."""
        while True:
            await self._alone.wait()
            retry_s = FIRST_RETRY_S
            while not self._connections.live:
                log.debug("all connections are lost: asking the known peers")
                await self._dht.introduce()
                await trio.sleep(retry_s * self._random.uniform(0.8, 1.2))
                retry_s = min(2 * retry_s, MAX_RETRY_S)
            self._alone = trio.Event()

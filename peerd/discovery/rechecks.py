"""Asks peers that failed, or whose connection broke, whether they are there, before a session is trusted to them.

Knows connections and where peers say they are; when somebody is asked, and what an answer is worth, is
`routing.links`' decision. The difficulty is that an end says little: who left in good order, who crashed and who
was cut off are equally gone for us, and each leaves our routes in the instant in which its connection ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import trio

from peerd.net.connections import Connections, PeerConnection
from peerd.net.peer_connection import IDLE
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import PeerFault
from peerd.protocol.identity import PeerId
from peerd.routing.directory.directory import Directory
from peerd.routing.failures.track_record import Links

# To look up where it is, dial, shake hands and hear an answer: ten round trips of 0.3 s.
PROOF_S = 3.0
# Handshakes at a time, where our own network was down and everybody is doubted at once.
AT_ONCE = 8
# GOAWAYs of a peer that goes on: it has another connection to us, or had no more use for this one.
_STAYS = frozenset(("duplicate", "replaced", "measured", IDLE))


class Proofs:
    """Works off the doubts in `links`. `may_dial` says which of a peer's addresses may be dialled on others' word."""

    def __init__(
        self,
        connections: Connections,
        links: Links,
        directory: Directory,
        may_dial: Callable[[Sequence[Multiaddr]], Sequence[Multiaddr]],
    ) -> None:
        self._connections = connections
        self._links = links
        self._directory = directory
        self._may_dial = may_dial
        self._sooner = trio.Event()
        self._limiter = trio.CapacityLimiter(AT_ONCE)

    async def run(self) -> None:
        """Ask whoever is due, until cancelled."""
        self._connections.on_lost.append(self._on_lost)
        self._links.on_doubt = self._hurry
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    self._sooner = trio.Event()
                    for peer_id in self._links.take_doubted():
                        nursery.start_soon(self._prove, peer_id)
                    with trio.move_on_at(self._links.asks_at_s):
                        await self._sooner.wait()
        finally:
            self._connections.on_lost.remove(self._on_lost)

    def _hurry(self) -> None:
        self._sooner.set()

    def _on_lost(self, connection: PeerConnection) -> None:
        stays = connection.closed_here or connection.farewell in _STAYS
        # Whom we would not choose anyway need not prove anything.
        if not stays and self._directory.is_server(connection.peer_id):
            self._links.doubt(connection.peer_id)

    async def _prove(self, peer_id: PeerId) -> None:
        try:
            async with self._limiter:
                with trio.fail_after(PROOF_S):
                    await self._ask(peer_id)
        except (PeerFault, trio.TooSlowError) as error:
            # It may have moved.
            self._directory.doubt(peer_id)
            self._links.unanswered(peer_id, str(error) or f"no answer within {PROOF_S:g} s")
        else:
            self._links.answered(peer_id)

    async def _ask(self, peer_id: PeerId) -> None:
        """Raises PeerFault where the peer is not there."""
        if peer_id == self._connections.peer_id:
            return
        connection = self._connections.live.get(peer_id)
        if connection is None:
            ways = self._may_dial(await self._directory.ways_to(peer_id))
            connection = await self._connections.connect(peer_id, ways, self._connections.strangers_policy)
        if not await connection.answers(math.inf):
            raise connection.lost_error()

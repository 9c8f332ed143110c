"""Asks a peer that failed, or whose connection broke, whether it is there, before a session is trusted to it.

`routing/failures/track_record.py` decides when a peer is asked and what its answer means. A connection's end does not
show whether the peer left in good order, crashed, or was cut off. So every such peer leaves our routes at the moment
when its connection ends, and returns when it has answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import trio

from peerd.net.connection.peer_connection import IDLE
from peerd.net.connections import Connections, PeerConnection
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import PeerFault
from peerd.protocol.identity import PeerId
from peerd.routing.directory.directory import Directory
from peerd.routing.failures.track_record import TrackRecord

# The time to look up its addresses, dial, shake hands and get an answer: ten round trips of 0.3 s.
PROOF_S = 3.0
# How many handshakes run at a time. If our own network was down, all peers are in doubt at once.
AT_ONCE = 8
# Reasons in a GOAWAY of a peer that keeps running: it has another connection to us, or does not use this one.
_STAYS = frozenset(("duplicate", "replaced", "measured", IDLE))


class Rechecks:
    """Asks the peers that `track_record` doubts. `may_dial` returns those of a peer's announced addresses that may be
    dialled.
    """

    def __init__(
        self,
        connections: Connections,
        track_record: TrackRecord,
        directory: Directory,
        may_dial: Callable[[Sequence[Multiaddr]], Sequence[Multiaddr]],
    ) -> None:
        self._connections = connections
        self._track_record = track_record
        self._directory = directory
        self._may_dial = may_dial
        self._sooner = trio.Event()
        self._limiter = trio.CapacityLimiter(AT_ONCE)

    async def run(self) -> None:
        """Ask each peer when it is due, until cancelled."""
        self._connections.on_lost.append(self._on_lost)
        self._track_record.on_doubt.append(self._hurry)
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    self._sooner = trio.Event()
                    for peer_id in self._track_record.take_doubted():
                        nursery.start_soon(self._prove, peer_id)
                    with trio.move_on_at(self._track_record.asks_at_s):
                        await self._sooner.wait()
        finally:
            self._track_record.on_doubt.remove(self._hurry)
            self._connections.on_lost.remove(self._on_lost)

    def _hurry(self) -> None:
        self._sooner.set()

    def _on_lost(self, connection: PeerConnection) -> None:
        stays = connection.closed_here or connection.farewell in _STAYS
        # Only servers can be chosen for a session, so only servers need to prove that they are there.
        if not stays and self._directory.is_server(connection.peer_id):
            self._track_record.doubt(connection.peer_id)

    async def _prove(self, peer_id: PeerId) -> None:
        try:
            async with self._limiter:
                with trio.fail_after(PROOF_S):
                    await self._ask(peer_id)
        except (PeerFault, trio.TooSlowError) as error:
            # The peer may have new addresses.
            self._directory.doubt(peer_id)
            self._track_record.unanswered(peer_id, str(error) or f"no answer within {PROOF_S:g} s")
        else:
            self._track_record.answered(peer_id)

    async def _ask(self, peer_id: PeerId) -> None:
        """Ask the peer. Raises PeerFault if it does not answer."""
        if peer_id == self._connections.peer_id:
            return
        connection = self._connections.live.get(peer_id)
        if connection is None:
            ways = self._may_dial(await self._directory.ways_to(peer_id))
            connection = await self._connections.connect(peer_id, ways, self._connections.strangers_policy)
        if not await connection.answers(math.inf):
            raise connection.lost_error()

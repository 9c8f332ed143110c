"""Notes what connected peers teach us: that they are there, their delays, their clocks, and that they serve blocks."""

from __future__ import annotations

from contextlib import suppress

import trio

from peerd.net.connections import Connections, PeerConnection
from peerd.net.limits.owners import network_of
from peerd.protocol.errors import ConnectionLost
from peerd.routing.clock import SwarmClock
from peerd.routing.directory.directory import Directory
from peerd.routing.failures.contributions import Contributions
from peerd.routing.failures.track_record import TrackRecord

MEASURE_S = 5.0
# A connection that survived our sleep answers within this; a peer that gave us up resets the connection at once.
AWAKE_S = 1.0


class Encounters:
    """Passes what connections show to the memories that plan with it."""

    def __init__(
        self,
        connections: Connections,
        directory: Directory,
        track_record: TrackRecord,
        contributions: Contributions,
        clock: SwarmClock,
    ) -> None:
        self._connections = connections
        self._directory = directory
        self._track_record = track_record
        self._contributions = contributions
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Encounters over {self._connections}>"

    def met(self, connection: PeerConnection) -> None:
        """Note that a peer is connected. One that we dialled is where it said that it is."""
        if connection.dialled:
            self._track_record.reached(connection.peer_id, network_of(connection.accountable_ip))
            self._note_serving(connection)

    async def hear_clock(self, connection: PeerConnection) -> None:
        """Note the time that the peer's hello says, once it has come."""
        with suppress(ConnectionLost):
            hello = await connection.wait_hello()
            # A stranger may dial us many times under different names, so only the clocks of peers that we dialled
            # count.
            if connection.dialled:
                network = network_of(connection.accountable_ip)
                self._clock.observed(connection.peer_id, hello.time_us / 1e6, network)

    async def measure(self) -> None:
        """Record the round-trip times that the connections' own pings measured, until cancelled."""
        while True:
            for peer_id, connection in self._connections.live.items():
                self._note_serving(connection)
                if connection.rtt_s is not None:
                    self._track_record.measured(peer_id, connection.rtt_s)
            await trio.sleep(MEASURE_S)

    async def close_dead(self) -> None:
        """After a sleep: ask all connected peers for a sign of life, and close the connections of those that give
        none.
        """
        async with trio.open_nursery() as nursery:
            for connection in self._connections.live.values():
                nursery.start_soon(self._ask, connection)

    async def _ask(self, connection: PeerConnection) -> None:
        if not await connection.answers(AWAKE_S):
            connection.close("silent", "we slept, and the peer no longer answers")

    def _note_serving(self, connection: PeerConnection) -> None:
        peer_id = connection.peer_id
        if self._directory.is_server(peer_id) and self._track_record.standing(peer_id).is_reached:
            self._contributions.seen_serving(peer_id)

"""Measures how far away peers are, over connections that it opens for that, and keeps some of them open.

The peers to measure are chosen by `client/finding/scout.py` and `spans/neighbours.py`. A connection costs both sides
tasks and memory, so nothing may be left behind; but another part of this process may have begun to use a connection
while it was measured. So only those connections are closed that were opened here and carried nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress

import trio

from peerd.net.connections import Connections, PeerConnection
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectionLost, PeerFault
from peerd.protocol.identity import PeerId
from peerd.routing.directory.offer import Offer
from peerd.routing.failures.track_record import TrackRecord

# How many handshakes run at a time; each takes a millisecond or two of our CPU.
AT_ONCE = 8
# A dial and a handshake take four round trips, and the farthest peers are 0.3 s away. A slower peer is of no use.
PROBE_S = 2.0
# The first answer may have been delayed by a busy event loop, on either side.
SAMPLES = 2
# The weight of a new measurement. It is the best of several samples taken every half minute, so it counts for more than
# one sample of a stream.
GAIN = 0.5


class RttProber:
    """Measures round-trip times, and notes them in `track_record`.

    dialable: returns those of a peer's announced addresses that may be dialled.
    """

    def __init__(
        self,
        connections: Connections,
        track_record: TrackRecord,
        dialable: Callable[[Sequence[Multiaddr]], Sequence[Multiaddr]],
    ) -> None:
        self._connections = connections
        self._track_record = track_record
        self._dialable = dialable
        self._opened: set[PeerId] = set()
        # A dial that took too long for a probe may still succeed later.
        self._late: set[PeerId] = set()

    def __repr__(self) -> str:
        return f"<RttProber opened={len(self._opened)}>"

    @property
    def has_opened(self) -> bool:
        """Whether there may be a connection to close."""
        return bool(self._opened or self._late)

    def is_connected(self, peer_id: PeerId) -> bool:
        """Whether a connection to the peer is open."""
        return peer_id in self._connections.live

    async def probe(self, offers: Iterable[Offer]) -> None:
        """Measure these peers, each for at most `PROBE_S`. Connections that this opens stay open until
        `close_unused`.
        """
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for offer in offers:
                nursery.start_soon(self._probe_one, offer, limiter)

    async def _probe_one(self, offer: Offer, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            with trio.move_on_after(PROBE_S), suppress(ConnectionLost):
                connection = await self._connect(offer)
                if connection is not None:
                    rtts_s = [await connection.measure() for _ in range(SAMPLES)]
                    self._track_record.measured(offer.peer_id, min(rtts_s), gain=GAIN)

    async def _connect(self, offer: Offer) -> PeerConnection | None:
        peer_id = offer.peer_id
        if peer_id == self._connections.peer_id:
            return None
        ways = self._dialable(offer.addresses)
        if peer_id not in self._connections.live:
            if not ways:
                # None of its addresses may be dialled without a reason. That is not the peer's fault, so it is not
                # noted as a failure.
                return None
            self._opened.add(peer_id)
        try:
            return await self._connections.connect(peer_id, ways, self._connections.strangers_policy)
        except PeerFault as error:
            # An announced peer that cannot be reached: we learn it now instead of in the middle of an answer.
            self._track_record.failed(peer_id, str(error))
            return None

    def close_unused(self, keep: Collection[PeerId] = ()) -> None:
        """Close the connections that were opened here and carried nothing else, except those to `keep`."""
        live = self._connections.live
        late = self._opened - live.keys()
        for peer_id in (self._opened | self._late) - set(keep):
            if (connection := live.get(peer_id)) is not None:
                connection.close_if_unused("measured", "the measurement is done")
        self._opened &= set(keep)
        self._late = late

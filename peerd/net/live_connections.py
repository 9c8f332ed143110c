"""The connections that are live now, one for each other peer, and the observers that are told of changes.

It chooses between two connections to the same peer. If both sides dialled, or one has lost a connection that the other
still believes in, the old connection is asked for a sign of life before the new one is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import trio

from peerd.net.connection.peer_connection import IDLE, PeerConnection
from peerd.net.containment import Containment
from peerd.protocol.errors import Overloaded
from peerd.protocol.identity import PeerId

log = logging.getLogger(__name__)

# How long an existing connection may take to answer when a second one comes.
PROBE_S = 2.0
# This many connections that we dialled are kept even if idle: these peers are asked first, and tell us the time and our
# address.
MIN_DIALLED = 16
# If a new peer comes and there is no room, a connection that was idle for this long is closed.
SPARED_S = 10.0
# Keys cost nothing: without a share, one network could take all places. An office or a data centre needs fewer.
SHARE_OF_A_NETWORK = 4
# The side that dialled closes a connection that was unused for this long. Each connection costs both sides 4 KiB of
# PINGs a minute, and in a swarm of a thousand a peer meets most of the others within hours.
IDLE_S = 120.0
# The pause between two checks whether an unused connection may be closed.
LOOK_AGAIN_S = 15.0
# A relayed connection whose place a direct one has taken is closed when it was unused for this long. The peer may have
# opened one more stream on it before it knew of the direct one.
RETIRED_S = 10.0

_REPLACED = "replaced"

Observer = Callable[[PeerConnection], None]


class LiveConnections:
    """Settled connections by PeerId. A lost connection is never among them.

    max_live: with this many connections, a new peer is accepted only if an idle connection can be closed for it. The
        peers of one public network that dialled us have at most a quarter of these places.
    on_connected, on_lost: called when a peer is connected and when it no longer is; they must not wait.
    """

    def __init__(self, containment: Containment, max_live: int) -> None:
        self.on_connected: list[Observer] = []
        self.on_lost: list[Observer] = []
        self._containment = containment
        self._max_live = max_live
        self._live: dict[PeerId, PeerConnection] = {}
        # Connections of peers that dialled us and have proved their identity, but are not among the live ones yet.
        self._arriving: set[PeerConnection] = set()
        # Relayed connections whose streams go on although a direct one has taken their place.
        self._retired: dict[PeerId, PeerConnection] = {}
        self._arrival = trio.lowlevel.ParkingLot()
        # Bytes a second of the fastest line among the connections that have ended.
        self._uplink = 0.0

    def __repr__(self) -> str:
        return f"<LiveConnections {len(self._live)}>"

    @property
    def by_peer(self) -> Mapping[PeerId, PeerConnection]:
        """The peers that are connected now; a live view."""
        return MappingProxyType(self._live)

    @property
    def uplink(self) -> float:
        """How many bytes a second we can send, as far as lines have shown; 0 before any has. A line may be slow at its
        other end, so the fastest one shows most about ours.
        """
        return max([self._uplink, *(each.uplink.bytes_a_second or 0.0 for each in self._live.values())])

    async def find(self, peer_id: PeerId) -> PeerConnection | None:
        """The live connection to a peer, or None, after a checkpoint."""
        while (connection := self._live.get(peer_id)) is not None:
            await trio.lowlevel.checkpoint()
            if connection.lost is None:
                return connection
        return None

    async def wait_for(self, peer_id: PeerId) -> PeerConnection:
        """Wait for a live connection to a peer, and return it."""
        while (connection := self._live.get(peer_id)) is None:
            await self._arrival.park()
        return connection

    async def is_better(self, connection: PeerConnection) -> bool:
        """Whether a new connection is better than our connection to the same peer, which may no longer answer.

        One that both sides have punched is better than one through a relay, and does not end it: see `add`.
        """
        while (old := self._live.get(connection.peer_id)) is not None:
            await trio.lowlevel.checkpoint()
            if connection.punched and old.relay is not None:
                return True
            if await old.answers(PROBE_S):
                return False
            old.close(_REPLACED, "there is a newer connection")
        return True

    @contextmanager
    def arriving(self, connection: PeerConnection) -> Iterator[None]:
        """Count a connection that a peer dialled while it settles. Raises Overloaded if its network has its share."""
        self._check_share(connection)
        self._arriving.add(connection)
        try:
            yield
        finally:
            self._arriving.discard(connection)

    def add(self, connection: PeerConnection) -> None:
        """Note that both sides take this connection. Raises Overloaded if the peer dialled and there is no room."""
        if (old := self._live.get(connection.peer_id)) is not None:
            if connection.punched and old.relay is not None:
                self._retire(old)
            else:
                old.close(_REPLACED, "there is a newer connection")
        # Only for a peer that has proved its identity is another connection closed.
        else:
            self._make_room(connection)
        self._arriving.discard(connection)
        connection.agreement.settle()
        self._live[connection.peer_id] = connection
        self._arrival.unpark_all()
        log.log(_log_level(connection), "connected to %s", connection.peer_id)
        self._tell(self.on_connected, connection)

    def remove(self, connection: PeerConnection) -> None:
        """Note that the connection has ended, whether or not it was ever added."""
        if connection.uplink.bytes_a_second is not None:
            # The remembered value is halved each time, because we may have moved to a slower network.
            self._uplink = max(self._uplink / 2, connection.uplink.bytes_a_second)
        if connection.retired.is_set() and self._retired.get(connection.peer_id) is connection:
            del self._retired[connection.peer_id]
        if connection.agreement.is_settled and self._live.get(connection.peer_id) is connection:
            del self._live[connection.peer_id]
            log.log(_log_level(connection), "lost %s: %s", connection.peer_id, connection.lost)
            self._tell(self.on_lost, connection)

    def has_room(self) -> bool:
        """Whether one more peer may dial us."""
        return len(self._open) + len(self._arriving) < self._max_live or _most_idle(self._open) is not None

    async def close_when_unused(self, connection: PeerConnection) -> None:
        """Close a connection that we dialled when it was unused for IDLE_S, if enough others that we dialled are
        left; or, if a direct connection has taken its place, soon after its last stream.
        """
        while not connection.retired.is_set():
            since, now = connection.unused_since, trio.current_time()
            wake_at = now + LOOK_AGAIN_S
            if since is None:
                wake_at = now + IDLE_S
            elif since + IDLE_S > now:
                wake_at = since + IDLE_S
            elif sum(other.dialled for other in self._live.values()) > MIN_DIALLED:
                connection.close(IDLE, f"it was not used for {IDLE_S:g} s")
                return
            with trio.move_on_at(wake_at):
                await connection.retired.wait()
        while True:
            left_s = RETIRED_S - connection.idle_s
            if left_s <= 0:
                break
            await trio.sleep(left_s)
        connection.close(_REPLACED, "there is a direct connection")

    @contextmanager
    def watching(self, *, connected: Observer | None = None, lost: Observer | None = None) -> Iterator[None]:
        """Call `connected` for each peer that is connected, now or while the block runs, and `lost` for each that is
        lost.
        """
        if connected is not None:
            for connection in tuple(self._live.values()):
                connected(connection)
        pairs = [(self.on_connected, connected), (self.on_lost, lost)]
        for observers, observer in pairs:
            if observer is not None:
                observers.append(observer)
        try:
            yield
        finally:
            for observers, observer in pairs:
                if observer is not None:
                    observers.remove(observer)

    def _retire(self, old: PeerConnection) -> None:
        """Open no more streams on a relayed connection. The peer that dialled it closes it when its streams have
        ended.
        """
        if (older := self._retired.get(old.peer_id)) is not None:
            # Direct connections to this peer come and go: what still uses the older relayed one goes to the new.
            older.close(_REPLACED, "there is a newer connection")
        self._retired[old.peer_id] = old
        del self._live[old.peer_id]
        old.retired.set()
        log.debug("%s is reached directly now, and no longer through %s", old.peer_id, old.relay)

    @property
    def _open(self) -> tuple[PeerConnection, ...]:
        """All that take a place: also relayed ones whose peers are reached directly, or were until they left."""
        return (*self._live.values(), *self._retired.values())

    def _make_room(self, connection: PeerConnection) -> None:
        if len(self._open) < self._max_live:
            return
        if (spared := _most_idle(self._open)) is not None:
            spared.close(IDLE, "others need the room")
        elif not connection.dialled:
            raise Overloaded(f"{self._max_live} peers are connected here, and all are busy")

    def _check_share(self, connection: PeerConnection) -> None:
        """Close an idle connection of a network that has its share of the places for one more of that network."""
        network = connection.network
        share = max(1, self._max_live // SHARE_OF_A_NETWORK)
        if not network or connection.peer_id in self._live:
            return
        others = [other for other in (*self._open, *self._arriving) if not other.dialled and other.network == network]
        if len(others) < share:
            return
        if (spared := _most_idle(others)) is None:
            raise Overloaded(f"{share} peers of {network} are connected here, the limit for one network")
        spared.close(IDLE, "others of its network need the room")

    def _tell(self, observers: Iterable[Observer], connection: PeerConnection) -> None:
        for observer in tuple(observers):
            with self._containment.around("an observer of connections", connection.peer_id):
                observer(connection)


def _log_level(connection: PeerConnection) -> int:
    # Strangers that come and go at will must not fill the disk with log lines.
    return logging.INFO if connection.dialled else logging.DEBUG


def _most_idle(connections: Iterable[PeerConnection]) -> PeerConnection | None:
    """The connection that has been idle for longest, if it may be closed; else None."""
    idlest = max(connections, key=lambda connection: connection.idle_s, default=None)
    return idlest if idlest is not None and idlest.idle_s >= SPARED_S else None

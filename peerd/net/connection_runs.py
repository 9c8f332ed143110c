"""Runs each connection from its first byte to its end: the door, the proof, the agreement, the hellos.

A peer that dials us passes the door, which limits how many unproven peers there are and how often they come. Then both
kinds of connection go the same way: the peer proves its identity, and both sides agree on one connection (`settling`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.connection.settling import agree, exchange_hellos, within_settle_time
from peerd.net.connection_maker import ConnectionMaker, relay_of
from peerd.net.containment import Containment
from peerd.net.dialling.dialler import Arrived
from peerd.net.introduction import Introduction
from peerd.net.limits.entry_rates import EntryRates
from peerd.net.limits.gate import Gate, Visit
from peerd.net.live_connections import LiveConnections
from peerd.net.transport import MessageChannel
from peerd.protocol.addresses import IpAddress
from peerd.protocol.errors import Overloaded, PeerFault
from peerd.protocol.identity import PeerId

log = logging.getLogger(__name__)


class ConnectionRuns:
    """Runs connections, of peers that dial us and of peers that we dial.

    settled: called when both sides have taken a connection.
    """

    def __init__(
        self,
        maker: ConnectionMaker,
        introduction: Introduction,
        live: LiveConnections,
        gate: Gate,
        rates: EntryRates,
        containment: Containment,
        settled: Callable[[PeerConnection], None],
    ) -> None:
        self._maker = maker
        self._introduction = introduction
        self._live = live
        self._gate = gate
        self._rates = rates
        self._containment = containment
        self._settled = settled

    def __repr__(self) -> str:
        return f"{self._gate!r}"

    def has_room(self, ip: IpAddress | None) -> bool:
        """Whether one more unproven peer may come from this address."""
        return self._live.has_room() and self._gate.has_room(ip)

    async def serve(self, channel: MessageChannel) -> None:
        """Serve a peer that has dialled us, directly or through a relay, until the connection ends."""
        relay = relay_of(channel)
        ip = channel.remote_ip if relay is None else relay.remote_ip
        scope = trio.CancelScope()
        visit = None if self._containment.refuses(ip=channel.remote_ip) else self._enter(ip, scope.cancel)
        if visit is None:
            log.debug("refused a connection from %s: too many or too often, or the address is banned", ip)
            return
        with scope:
            try:
                with self._containment.around("a connection", ip=channel.remote_ip):
                    await self._maker.make(channel, initiator=False).run(partial(self._welcome, visit))
            finally:
                visit.leave()

    def _enter(self, ip: IpAddress | None, on_replaced: Callable[[], None]) -> Visit | None:
        """A place for one more unproven peer; None if there is none for this address now."""
        # An attempt that is refused for want of room has cost us nothing, so only the others count for the rate. The
        # gate comes last, for whom it lets in may replace another one.
        if not (self._live.has_room() and self._gate.has_room(ip)):
            return None
        if not self._rates.may_shake_hands(ip, trio.current_time()):
            return None
        return self._gate.enter(ip, on_replaced)

    async def run_dialled(self, channel: MessageChannel, expected: PeerId | None, arrived: Arrived) -> PeerConnection:
        """Run a connection that we dialled to its end. `arrived` is called when both sides have taken it."""
        connection = self._maker.make(channel, initiator=True, expected=expected)
        await connection.run(partial(self._settle_dialled, arrived))
        return connection

    async def run_met(
        self, channel: MessageChannel, peer_id: PeerId, arrived: Arrived, *, initiator: bool
    ) -> PeerConnection:
        """Run a connection for which both sides dialled to its end, as `run_dialled` does. `initiator`: whether we
        count as the side that dialled.
        """
        connection = self._maker.make(channel, initiator=initiator, expected=peer_id, punched=True)
        await connection.run(partial(self._settle_dialled, arrived))
        return connection

    async def _settle_dialled(self, arrived: Arrived, connection: PeerConnection) -> None:
        await self._wait_proven(connection)
        await self._settle(connection, arrived)
        if connection.dialled:
            await self._live.close_when_unused(connection)

    async def _welcome(self, visit: Visit, connection: PeerConnection) -> None:
        await self._wait_proven(connection)
        visit.leave()
        if not self._rates.may_settle(connection.peer_id, trio.current_time()):
            raise Overloaded("you dial again too often")
        with self._live.arriving(connection):
            await self._settle(connection)

    async def _wait_proven(self, connection: PeerConnection) -> None:
        """Wait for the proof of the peer's identity. Raises PeerFault for a peer with which we want no connection."""
        await connection.agreement.proven.wait()
        if self._containment.refuses(connection.peer_id, connection.remote_ip):
            raise PeerFault("the peer did too much wrong lately")

    async def _settle(self, connection: PeerConnection, arrived: Arrived | None = None) -> None:
        """Agree with the peer on this connection and exchange hellos, or end it. Raises PeerFault."""
        with within_settle_time():
            if not await agree(connection, self._live.is_better):
                return
            if arrived is not None:
                arrived(connection)
            self._live.add(connection)
            self._settled(connection)
            connection.agreement.introduce(await exchange_hellos(connection, self._introduction.hello_to(connection)))

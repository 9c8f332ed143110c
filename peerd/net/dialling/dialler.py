"""Dials peers. There is at most one search for a connection to each peer, and all tasks that want that peer share it.

A search ends as soon as there is a connection to the peer, whichever side dialled it. Direct addresses are tried before
those that lead through a relay, because the relay must be dialled first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

import trio

from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.connection.settling import SETTLE_S
from peerd.net.containment import Containment
from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.dialling.circuits import open_circuit
from peerd.net.dialling.dial import ADDRESS_TIMEOUT_S, Dial
from peerd.net.dialling.sightings import Sightings
from peerd.net.live_connections import LiveConnections
from peerd.net.transport import MessageChannel, Transport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, InvalidRequest, PeerFault
from peerd.protocol.identity import PeerId

Arrived = Callable[[PeerConnection], None]
RunDialled = Callable[[MessageChannel, PeerId | None, Arrived], Awaitable[PeerConnection]]
"""Runs a connection over a channel to its end, and calls `Arrived` when both sides have taken it."""


class Dialler:
    """Searches for connections to peers. Attempts run in `nursery`, because one of them becomes the connection.

    may_be_relayed: whether ways through relays are tried.
    shows_ip: whether relays may tell the peers behind them our IP address.
    trusted: addresses that our operator gave us: wherever they lead, they may be dialled.
    """

    def __init__(
        self,
        own: PeerId,
        live: LiveConnections,
        transport: Transport,
        run: RunDialled,
        containment: Containment,
        nursery: trio.Nursery,
        *,
        may_be_relayed: bool,
        shows_ip: bool = False,
        trusted: Sequence[Multiaddr] = (),
    ) -> None:
        self._own = own
        self._live = live
        self._transport = transport
        self._run = run
        self._containment = containment
        self._nursery = nursery
        self._may_be_relayed = may_be_relayed
        self._shows_ip = shows_ip
        self._trusted = frozenset(address.with_peer(None) for address in trusted)
        #: Where peers were found.
        self.sightings = Sightings()
        self._dials: dict[PeerId, Dial] = {}

    def __len__(self) -> int:
        return len(self._dials)

    async def reach(self, peer_id: PeerId, addresses: Sequence[Multiaddr], policy: DialPolicy) -> PeerConnection:
        """The live connection to a peer, or a new one. Raises as `Connections.connect` does."""
        if peer_id == self._own:
            raise InvalidRequest("a peer does not dial itself")
        tried: set[Multiaddr] = set()
        while True:
            if (connection := await self._live.find(peer_id)) is not None:
                return connection
            dial = self._dials.get(peer_id)
            if dial is None or dial.over:
                fresh = _direct_first(address.with_peer(peer_id) for address in addresses)
                dial = Dial([address for address in dict.fromkeys(fresh) if address not in tried], policy)
                self._dials[peer_id] = dial
                self._nursery.start_soon(self._run_dial, dial, peer_id)
            await dial.wait()
            if dial.connection is not None:
                return dial.connection
            tried |= set(dial.addresses)
            if tried >= {address.with_peer(peer_id) for address in addresses}:
                raise dial.error(peer_id)

    async def reach_anybody(self, addresses: Sequence[Multiaddr], policy: DialPolicy) -> PeerConnection:
        """A connection to the first peer that answers at one of the addresses. Raises ConnectFailed, WrongPeer."""
        dial = Dial(tuple(dict.fromkeys(_direct_first(addresses))), policy)
        self._nursery.start_soon(self._run_dial, dial, None)
        await dial.wait()
        if dial.connection is None:
            raise dial.error("the peer")
        return dial.connection

    def note_connected(self, connection: PeerConnection) -> None:
        """Note that the peer is connected, which ends a search for it."""
        if (dial := self._dials.get(connection.peer_id)) is not None:
            dial.succeed(connection)

    async def _run_dial(self, dial: Dial, peer_id: PeerId | None) -> None:
        try:
            await dial.run(self._nursery, self._attempt)
        finally:
            if peer_id is not None and self._dials.get(peer_id) is dial:
                del self._dials[peer_id]

    async def _attempt(self, address: Multiaddr, dial: Dial) -> PeerFault:
        with self._containment.around("a dial", address.peer_id, address.ip):
            return await self._try_address(address, dial)
        return ConnectFailed("a bug of ours")

    async def _try_address(self, address: Multiaddr, dial: Dial) -> PeerFault:
        try:
            with trio.fail_after(ADDRESS_TIMEOUT_S):
                channel = await self._open_channel(address, dial.policy)
        except trio.TooSlowError:
            return ConnectFailed(f"no answer within {ADDRESS_TIMEOUT_S:g} s")
        except PeerFault as error:
            return error

        def arrived(connection: PeerConnection) -> None:
            self._note_found(connection, address)
            dial.succeed(connection, address)

        connection = await self._run(channel, address.peer_id, arrived)
        if connection.is_duplicate:
            self._note_found(connection, address)
            await self._take_other(connection, dial)
        lost = connection.lost
        return lost if isinstance(lost, PeerFault) else ConnectFailed(str(lost))

    def _note_found(self, connection: PeerConnection, address: Multiaddr) -> None:
        if address.relay is None:
            self.sightings.found(connection.peer_id, address, connection.remote_ip)

    async def _open_channel(self, address: Multiaddr, policy: DialPolicy) -> MessageChannel:
        """Raises PeerFault."""
        if address.relay is None:
            is_trusted = address.with_peer(None) in self._trusted
            return await self._transport.dial(address, self._nursery, ANYWHERE if is_trusted else policy)
        if not self._may_be_relayed:
            raise ConnectFailed("we use no relays")
        if address.peer_id is None:
            raise ConnectFailed("the address does not name the peer behind the relay")
        if address.relay in (self._own, address.peer_id):
            raise ConnectFailed("the relay is one of the two ends")
        relay = await self.reach(address.relay, [replace(address, relay=None, peer_id=address.relay)], policy)
        if relay.relay is not None:
            raise ConnectFailed(
                "we reach this relay only through another relay, and circuits through two relays are not possible"
            )
        return await open_circuit(relay, address.peer_id, shows_ip=self._shows_ip)

    async def _take_other(self, refused: PeerConnection, dial: Dial) -> None:
        """Use the better connection that one of the two sides has, and which may not have arrived yet."""
        with trio.move_on_after(SETTLE_S):
            dial.succeed(await self._live.wait_for(refused.peer_id))


def _direct_first(addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
    return sorted(addresses, key=lambda address: address.relay is not None)

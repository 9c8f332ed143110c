"""All connections of a peer: at most one for each other peer, dialled by either side.

Knows who is connected; what is said on the streams is the handlers' business. The difficulty is that two
peers dial each other at the same moment, or one dials again because it lost a connection that the other
still believes in. Of two peers the one with the smaller PeerId chooses, nothing is sent on a connection
before it has, and it asks its old connection for a sign of life before it takes or refuses a new one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType

import trio

from peerd.net.circuits import CircuitChannel, open_circuit
from peerd.net.containment import Containment
from peerd.net.dial import ADDRESS_TIMEOUT_S, Dial
from peerd.net.gate import Gate, Places, descriptor_limit, host_of, places
from peerd.net.loopback import loopback
from peerd.net.peer_connection import IDLE, SETTLE_S, PeerConnection, StreamHandler
from peerd.net.stream import Carrier, Stream
from peerd.net.transport import MessageChannel, Transport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.budget import DEFAULT_TOTAL_BYTES, BufferBudget
from peerd.protocol.connection.connection import Connection, Limits
from peerd.protocol.connection.frames import MAX_PAYLOAD_BYTES, Priority
from peerd.protocol.connection.hello import MAX_ITEMS, Hello
from peerd.protocol.errors import ConnectFailed, InvalidRequest, PeerFault
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.relay import INNER_PAYLOAD_BYTES
from peerd.trio_tools import open_tasks

__all__ = ["Connections", "PeerConnection", "Stream", "StreamHandler", "open_connections"]

log = logging.getLogger(__name__)

DEFAULT_AGENT = "peerd"
# How long a connection that we believe in may take to show that it lives, when a second one comes.
PROBE_S = 2.0
# So many that we dialled stay, however idle: whom we ask first, and who tells us what the time and our address is.
MIN_DIALLED = 16
# Where somebody new comes and there is no more room, a connection that was idle for so long makes it.
SPARED_S = 10.0

Observer = Callable[[PeerConnection], None]


class Connections:
    """Live connections by PeerId. Made by `open_connections`.

    handlers: protocol id -> what runs for each stream of it that a peer opens. May be changed at any time.
    announced: where others are told to dial us; roles: what they are told that we do. Both may be changed too.
    may_be_relayed: whether we reach others through relays where there is no other way.
    on_connected, on_lost: called, without waiting, when a peer is connected and when it no longer is.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        handlers: Mapping[str, StreamHandler],
        nursery: trio.Nursery,
        *,
        swarm_key: bytes | None,
        agent: str,
        roles: Sequence[str],
        limits: Limits,
        now: Callable[[], float],
        containment: Containment,
        buffer_bytes: int,
        places: Places,
    ) -> None:
        self.containment = containment
        #: What peers may make us hold in buffers, over all connections.
        self.budget = BufferBudget(buffer_bytes)
        self.peer_id = identity.peer_id
        self.handlers = dict(handlers)
        self.listen_addresses: tuple[Multiaddr, ...] = ()
        self.announced: tuple[Multiaddr, ...] = ()
        self.roles = tuple(roles)
        self.may_be_relayed = True
        self.on_connected: list[Observer] = []
        self.on_lost: list[Observer] = []
        self._identity = identity
        self._transport = transport
        self._nursery = nursery
        self._swarm_key = swarm_key
        self._agent = agent
        self._limits = limits
        self._now = now
        self._gate = Gate(places.unproven)
        self._max_live = places.settled
        self._live: dict[PeerId, PeerConnection] = {}
        self._dials: dict[PeerId, Dial] = {}
        self._loopback: PeerConnection | None = None
        self._arrival = trio.lowlevel.ParkingLot()
        # The fastest line that has ended.
        self._uplink = 0.0

    def __repr__(self) -> str:
        return f"<Connections of {self.peer_id} live={len(self._live)} dials={len(self._dials)} {self._gate!r}>"

    @property
    def live(self) -> Mapping[PeerId, PeerConnection]:
        """Who is connected now; a view that changes."""
        return MappingProxyType(self._live)

    @property
    def uplink(self) -> float:
        """Bytes a second that we can send, as far as lines have shown; 0 before any did. A line may be slow at its
        other end, so the fastest tells most of ours."""
        return max([self._uplink, *(each.uplink.bytes_a_second or 0.0 for each in self._live.values())])

    async def connect(self, peer_id: PeerId | None, addresses: Sequence[Multiaddr]) -> PeerConnection:
        """The connection to a peer: the live one, or a new one through any of `addresses`.

        peer_id: None takes whoever answers (an address that names a peer still means that peer). Callers who
        want the same peer share one dial. Sets no deadline beyond 6 s for each address. What it returns may
        be lost again by then. Raises ConnectFailed with each address's reason, WrongPeer, InvalidRequest for
        our own PeerId.
        """
        if peer_id is None:
            return await self._dial_anybody(addresses)
        if peer_id == self.peer_id:
            raise InvalidRequest("a peer does not dial itself")
        tried: set[Multiaddr] = set()
        while True:
            if (connection := self._live.get(peer_id)) is not None:
                await trio.lowlevel.checkpoint()
                if connection.lost is None:
                    return connection
                self._forget(connection)
                continue
            dial = self._dials.get(peer_id)
            if dial is None or dial.over:
                fresh = _direct_first(address.with_peer(peer_id) for address in addresses)
                dial = Dial([address for address in dict.fromkeys(fresh) if address not in tried])
                self._dials[peer_id] = dial
                self._nursery.start_soon(self._run_dial, dial, peer_id)
            await dial.wait()
            if dial.connection is not None:
                return dial.connection
            tried |= set(dial.addresses)
            if tried >= {address.with_peer(peer_id) for address in addresses}:
                raise dial.error(peer_id)

    async def open_stream(
        self,
        peer_id: PeerId,
        protocol: str,
        *,
        addresses: Sequence[Multiaddr] = (),
        priority: Priority = Priority.CONTROL,
    ) -> Stream:
        """A new stream to a peer, over its live connection or a new one; to ourselves, in memory.

        priority: of messages that name none. Raises as `connect` does, and ConnectionLost, Overloaded.
        """
        if peer_id == self.peer_id:
            connection = await self._to_ourselves()
        else:
            connection = await self.connect(peer_id, addresses)
        return connection.open_stream(protocol, priority=priority)

    async def listen(self, address: Multiaddr) -> Multiaddr:
        """Take connections there too; returns the address with its real port. Raises OSError."""
        bound: Multiaddr = await self._nursery.start(self._transport.listen, address.with_peer(None), self._serve)
        self.listen_addresses += (bound,)
        return bound

    async def _to_ourselves(self) -> PeerConnection:
        if self._loopback is None or self._loopback.lost is not None:
            self._loopback, run = loopback(self, self.peer_id, self._limits)
            self._nursery.start_soon(self._contained, run, "the connection to ourselves")
        connection = self._loopback
        await connection.wait_hello()
        return connection

    async def _contained(self, run: Callable[[], Awaitable[None]], what: str) -> None:
        with self.containment.around(what):
            await run()

    # Dialling.

    async def _dial_anybody(self, addresses: Sequence[Multiaddr]) -> PeerConnection:
        dial = Dial(tuple(dict.fromkeys(_direct_first(addresses))))
        self._nursery.start_soon(self._run_dial, dial, None)
        await dial.wait()
        if dial.connection is None:
            raise dial.error("the peer")
        return dial.connection

    async def _run_dial(self, dial: Dial, peer_id: PeerId | None) -> None:
        try:
            await dial.run(self._nursery, self._attempt)
        finally:
            if peer_id is not None and self._dials.get(peer_id) is dial:
                del self._dials[peer_id]

    async def _attempt(self, address: Multiaddr, dial: Dial) -> PeerFault:
        with self.containment.around("a dial", address.peer_id, address.ip):
            return await self._try_address(address, dial)
        return ConnectFailed("a bug of ours")

    async def _try_address(self, address: Multiaddr, dial: Dial) -> PeerFault:
        try:
            with trio.fail_after(ADDRESS_TIMEOUT_S):
                channel = await self._open_channel(address)
        except trio.TooSlowError:
            return ConnectFailed(f"no answer within {ADDRESS_TIMEOUT_S:g} s")
        except PeerFault as error:
            return error
        connection = self._connection(channel, initiator=True, expected=address.peer_id)
        connection.on_settled = lambda: dial.succeed(connection, address)
        await connection.run()
        if connection.is_duplicate:
            await self._take_other(connection, dial)
        lost = connection.lost
        return lost if isinstance(lost, PeerFault) else ConnectFailed(str(lost))

    async def _open_channel(self, address: Multiaddr) -> MessageChannel:
        """Raises PeerFault."""
        if address.relay is None:
            return await self._transport.dial(address, self._nursery)
        if not self.may_be_relayed:
            raise ConnectFailed("we use no relays")
        if address.peer_id is None:
            raise ConnectFailed("it does not say whom the relay should reach")
        if address.relay in (self.peer_id, address.peer_id):
            raise ConnectFailed("the relay is one of the two ends")
        relay = await self.connect(address.relay, [replace(address, relay=None, peer_id=address.relay)])
        if relay.relay is not None:
            raise ConnectFailed("we reach the relay through a relay ourselves, and one hop is the limit")
        return await open_circuit(relay, address.peer_id)

    async def _take_other(self, refused: PeerConnection, dial: Dial) -> None:
        """One of both sides had a better connection: use that, which may be on its way to us still."""
        with trio.move_on_after(SETTLE_S):
            while (other := self._live.get(refused.peer_id)) is None:
                await self._arrival.park()
            dial.succeed(other)

    # Accepting.

    def may_enter(self, relay: Carrier) -> bool:
        """Whether one more unproven peer may come through a relay."""
        return self._has_room() and self._gate.has_room(relay.remote_ip)

    async def take(self, channel: CircuitChannel) -> None:
        """Be the connection of a caller that came through a relay, until it ends."""
        await self._serve(channel)

    async def _serve(self, channel: MessageChannel) -> None:
        relay = _relay_of(channel)
        ip = channel.remote_ip if relay is None else relay.remote_ip
        if self.containment.refuses(ip=ip) or not self._has_room() or not self._gate.enter(ip):
            log.debug("turned %s away: too many connections, or too many failures that it caused", ip)
            return
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._gate.leave(ip)

        connection = self._connection(channel, initiator=False)
        connection.on_proven = leave
        try:
            with self.containment.around("a connection", ip=ip):
                await connection.run()
        finally:
            leave()

    def _has_room(self) -> bool:
        return len(self._live) < self._max_live or self._most_idle() is not None

    def _most_idle(self) -> PeerConnection | None:
        """The connection that can be missed most easily, where one can."""
        idlest = max(self._live.values(), key=lambda connection: connection.idle_s, default=None)
        return idlest if idlest is not None and idlest.idle_s >= SPARED_S else None

    def _connection(
        self, channel: MessageChannel, *, initiator: bool, expected: PeerId | None = None
    ) -> PeerConnection:
        relay = _relay_of(channel)
        core = Connection(
            self._identity,
            initiator=initiator,
            now=trio.current_time(),
            expected=expected,
            swarm_key=self._swarm_key,
            limits=self._limits,
            payload_bytes=MAX_PAYLOAD_BYTES if relay is None else INNER_PAYLOAD_BYTES,
            # Connections from one network share what one owner may make us hold; a proxy's address says nothing.
            buffers=self.budget.open(host_of(channel.remote_ip if relay is None else relay.remote_ip)),
        )
        return PeerConnection(core, channel, self, relay)

    # What each PeerConnection asks.

    def hello_to(self, connection: PeerConnection) -> Hello:
        return Hello(
            agent=self._agent,
            time_us=int(self._now() * 1e6),
            protocols=tuple(sorted(self.handlers))[:MAX_ITEMS],
            addresses=tuple(map(str, self.announced))[:MAX_ITEMS],
            observed_ip=str(connection.remote_ip or ""),
            roles=self.roles[:MAX_ITEMS],
        )

    def decides(self, peer_id: PeerId) -> bool:
        return self.peer_id < peer_id

    async def decide(self, connection: PeerConnection) -> bool:
        while (old := self._live.get(connection.peer_id)) is not None:
            await trio.lowlevel.checkpoint()
            if await old.answers(PROBE_S):
                return False
            old.close("replaced", "there is a newer connection")
            self._forget(old)
        return True

    def can_spare_one(self) -> bool:
        return sum(other.dialled for other in self._live.values()) > MIN_DIALLED

    def settled(self, connection: PeerConnection) -> None:
        peer_id = connection.peer_id
        assert connection.lost is None
        if (old := self._live.get(peer_id)) is not None:
            old.close("replaced", "there is a newer connection")
        # Only who proved itself makes another leave.
        elif len(self._live) >= self._max_live and (spared := self._most_idle()) is not None:
            spared.close(IDLE, "others need the room")
        self._live[peer_id] = connection
        if (dial := self._dials.get(peer_id)) is not None:
            dial.succeed(connection)
        self._arrival.unpark_all()
        log.log(_log_level(connection), "connected to %s", peer_id)
        self._tell(self.on_connected, connection)

    def ended(self, connection: PeerConnection) -> None:
        if connection.uplink.bytes_a_second is not None:
            # Half of what is remembered goes each time: we may have moved to another network.
            self._uplink = max(self._uplink / 2, connection.uplink.bytes_a_second)
        if connection.settled and self._forget(connection):
            log.log(_log_level(connection), "lost %s: %s", connection.peer_id, connection.lost)
            self._tell(self.on_lost, connection)

    def refuses(self, connection: PeerConnection) -> bool:
        return self.containment.refuses(connection.peer_id, connection.accountable_ip)

    def contain(self, error: Exception, what: str, connection: PeerConnection) -> None:
        self.containment.contain(error, what, connection.proven_peer, connection.accountable_ip)

    def _forget(self, connection: PeerConnection) -> bool:
        """Whether it was the live connection of its peer, which now has none. None in `_live` is ever lost."""
        if self._live.get(connection.peer_id) is not connection:
            return False
        del self._live[connection.peer_id]
        return True

    def _tell(self, observers: Sequence[Observer], connection: PeerConnection) -> None:
        for observer in tuple(observers):
            with self.containment.around("an observer of connections", connection.peer_id):
                observer(connection)


def _relay_of(channel: MessageChannel) -> Carrier | None:
    return channel.relay if isinstance(channel, CircuitChannel) else None


def _log_level(connection: PeerConnection) -> int:
    # Strangers that come and go at will must not fill the disk with lines.
    return logging.INFO if connection.dialled else logging.DEBUG


def _direct_first(addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
    return sorted(addresses, key=lambda address: address.relay is not None)


@asynccontextmanager
async def open_connections(
    identity: Identity,
    *,
    transport: Transport,
    listen: Sequence[Multiaddr] = (),
    handlers: Mapping[str, StreamHandler],
    swarm_key: bytes | None = None,
    agent: str = DEFAULT_AGENT,
    roles: Sequence[str] = (),
    limits: Limits | None = None,
    now: Callable[[], float] = time.time,
    containment: Containment | None = None,
    buffer_bytes: int = DEFAULT_TOTAL_BYTES,
    room: Places | None = None,
) -> AsyncIterator[Connections]:
    """Listen, and yield what dials. At the end every connection is closed, within a second.

    swarm_key: the private swarm's 32 bytes. agent, roles, now: what hellos say of us; `now` is in seconds since 1970.
    containment: what becomes of bugs, in handlers too; None is one of our own.
    buffer_bytes: what peers may make us hold in buffers, over all connections.
    room: how many peers may come to us; None is as many as the process's limit of descriptors allows.
    Raises OSError for an address that cannot be listened on.
    """
    async with open_tasks() as tasks:
        shelter, nursery = await tasks.start(_shelter)
        connections = Connections(
            identity,
            transport,
            handlers,
            nursery,
            swarm_key=swarm_key,
            agent=agent,
            roles=roles,
            limits=limits or Limits(),
            now=now,
            containment=containment or Containment(),
            buffer_bytes=buffer_bytes,
            places=room or places(descriptor_limit()),
        )
        try:
            for address in listen:
                await connections.listen(address)
            yield connections
        finally:
            shelter.cancel()


async def _shelter(task_status: trio.TaskStatus[tuple[trio.CancelScope, trio.Nursery]]) -> None:
    """A nursery that lives until its own scope is cancelled.

    Who uses connections may be cancelled and still have a last word to say over them: that it leaves.
    """
    # Whoever is cancelled before this has started would wait for its end, and could not bring it about.
    await trio.lowlevel.checkpoint_if_cancelled()
    with trio.CancelScope(shield=True) as scope:
        async with trio.open_nursery() as nursery:
            task_status.started((scope, nursery))
            await trio.sleep_forever()

"""All connections of a peer: at most one for each other peer, dialled by either side.

Joins the parts: `dialling` searches for connections, `connection_runs` runs each from its first byte to its end, and
`live_connections` holds those that both sides have taken.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager

import trio

from peerd.meters import Meters
from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.connection_maker import ConnectionMaker
from peerd.net.connection_runs import ConnectionRuns
from peerd.net.containment import Containment
from peerd.net.dial_policy import DialPolicy, DialRules
from peerd.net.dialling.circuits import CircuitChannel
from peerd.net.dialling.dialler import Dialler
from peerd.net.dialling.meeting import Meetings
from peerd.net.dialling.prove import prove
from peerd.net.dialling.sightings import Sightings
from peerd.net.handlers import StreamHandler
from peerd.net.introduction import Introduction
from peerd.net.limits.entry_rates import EntryRates
from peerd.net.limits.gate import ConnectionLimits, Gate, connection_limits, descriptor_limit
from peerd.net.live_connections import LiveConnections, Observer
from peerd.net.loopback import loopback
from peerd.net.stream import Carrier, Stream
from peerd.net.transport import Transport
from peerd.protocol.addresses import IpAddress, Multiaddr
from peerd.protocol.connection.budget import DEFAULT_TOTAL_BYTES, BufferBudget
from peerd.protocol.connection.connection import Limits
from peerd.protocol.connection.frames import Priority
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.invitation import swarm_digest
from peerd.trio_tools import open_tasks

__all__ = ["Connections", "PeerConnection", "Stream", "StreamHandler", "open_connections"]

DEFAULT_AGENT = "peerd"


class Connections:
    """Live connections by PeerId. Made by `open_connections`.

    handlers: protocol id -> the function that runs for each stream of it that a peer opens. `handle` adds one.
    may_be_relayed: whether we reach others through relays if there is no other way.
    may_punch: whether we try to reach others directly beside a relay, for which relays may tell them our IP address.
    own_policy: which addresses may be dialled for our own purposes; strangers_policy: which ones if a stranger named
        them.
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
        may_be_relayed: bool,
        may_punch: bool,
        dial_rules: DialRules,
        limits: Limits,
        now: Callable[[], float],
        containment: Containment,
        buffer_bytes: int,
        room: ConnectionLimits,
        meters: Meters,
    ) -> None:
        self.containment = containment
        #: What this peer counts and times.
        self.meters = meters
        #: How many bytes peers may make us hold in buffers, over all connections.
        self.budget = BufferBudget(buffer_bytes)
        self.peer_id = identity.peer_id
        self.handlers = dict(handlers)
        self.listen_addresses: tuple[Multiaddr, ...] = ()
        self._introduction = Introduction(agent, now, self.handlers, roles)
        self.may_be_relayed = may_be_relayed
        self.may_punch = may_punch
        self.own_policy = dial_rules.own
        self.strangers_policy = dial_rules.strangers
        self._transport = transport
        self._nursery = nursery
        self._swarm_key = swarm_key
        self._limits = limits
        rates = EntryRates()
        self._live = LiveConnections(containment, room.settled)
        self._runs = ConnectionRuns(
            ConnectionMaker(
                identity, swarm_key, limits, self.budget, self.handlers, containment, rates, self._live.remove
            ),
            self._introduction,
            self._live,
            Gate(room.unproven),
            rates,
            containment,
            lambda connection: self._dialler.note_connected(connection),
        )
        self._dialler = Dialler(
            self.peer_id,
            self._live,
            transport,
            self._runs.run_dialled,
            containment,
            nursery,
            may_be_relayed=may_be_relayed,
            shows_ip=may_punch,
            trusted=dial_rules.trusted,
        )
        #: Meets peers behind NATs that dial us at the same moment.
        self.meetings = Meetings(transport, self._runs.run_met, self._introduction, swarm_key, containment, nursery)
        self._loopback: PeerConnection | None = None

    def __repr__(self) -> str:
        live, dials = len(self.live), len(self._dialler)
        return f"<Connections of {self.peer_id} live={live} dials={dials} {self._runs!r}>"

    @property
    def live(self) -> Mapping[PeerId, PeerConnection]:
        """The peers that are connected now; a live view."""
        return self._live.by_peer

    @property
    def listen_as(self) -> tuple[Multiaddr, ...]:
        """The addresses that others are told to dial."""
        return tuple(self._introduction.listen_as)

    @property
    def uplink(self) -> float:
        """How many bytes a second we can send, as far as lines have shown; 0 before any has. A line may be slow at its
        other end, so the fastest one shows most about ours.
        """
        return self._live.uplink

    @property
    def on_connected(self) -> list[Observer]:
        """Called when a peer is connected; observers must not wait. See `watching`."""
        return self._live.on_connected

    @property
    def on_lost(self) -> list[Observer]:
        """Called when a peer is no longer connected; observers must not wait. See `watching`."""
        return self._live.on_lost

    def watching(
        self, *, connected: Observer | None = None, lost: Observer | None = None
    ) -> AbstractContextManager[None]:
        """Call `connected` for each peer that is connected, now or while the block runs, and `lost` for each that is
        lost.
        """
        return self._live.watching(connected=connected, lost=lost)

    @property
    def swarm(self) -> bytes | None:
        """The digest of our private swarm's key, which names the swarm; None if it is open to everybody."""
        return None if self._swarm_key is None else swarm_digest(self._swarm_key)

    async def connect(
        self, peer_id: PeerId | None, addresses: Sequence[Multiaddr], policy: DialPolicy | None = None
    ) -> PeerConnection:
        """The connection to a peer: the live one, or a new one through any of `addresses`.

        peer_id: None takes the peer that answers (but an address that names a peer still means that peer). Callers that
            want the same peer share one dial. Sets no deadline beyond 6 s for each address. The connection may be lost
            by the time it is returned. policy: which addresses may be dialled; None means `own_policy`. Raises
            ConnectFailed with each address's reason, WrongPeer, InvalidRequest for our own PeerId.
        """
        if peer_id is None:
            return await self._dialler.reach_anybody(addresses, policy or self.own_policy)
        return await self._dialler.reach(peer_id, addresses, policy or self.own_policy)

    async def open_stream(
        self,
        peer_id: PeerId,
        protocol: str,
        *,
        addresses: Sequence[Multiaddr] = (),
        priority: Priority = Priority.CONTROL,
        policy: DialPolicy | None = None,
    ) -> Stream:
        """A new stream to a peer, over its live connection or a new one; to ourselves, in memory.

        priority: of messages that name none. policy: as in `connect`. Raises as `connect` does, and ConnectionLost,
        Overloaded.
        """
        if peer_id == self.peer_id:
            connection = await self._to_ourselves()
        else:
            connection = await self.connect(peer_id, addresses, policy)
        return connection.open_stream(protocol, priority=priority)

    @property
    def sightings(self) -> Sightings:
        """The addresses at which peers were found when we dialled them."""
        return self._dialler.sightings

    async def find(self, peer_id: PeerId, address: Multiaddr, policy: DialPolicy) -> bool:
        """Check whether a peer answers at an address, and note the result in `sightings`. Takes at most 9 s.

        It makes no connection between the two peers, whether or not there is one.
        """
        sightings = self.sightings

        def reached(ip: IpAddress | None) -> None:
            sightings.found(peer_id, address, ip)

        outcome: str = "failed"
        async with open_tasks() as tasks:
            outcome = await prove(self._transport, address, peer_id, self._swarm_key, tasks, policy, reached)
        if outcome != "reached":
            sightings.missed(peer_id, address)
        return outcome == "reached"

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` for each stream of a protocol from now on. Peers hear of it when they connect."""
        self.handlers[protocol] = handler

    def stop_handling(self, protocol: str) -> None:
        """Refuse streams of a protocol from now on."""
        self.handlers.pop(protocol, None)

    def present_as(self, *, listen_as: Sequence[Multiaddr] | None = None, roles: Sequence[str] | None = None) -> None:
        """Tell peers that connect from now on where to dial us, and what we offer. None leaves it as it is."""
        if listen_as is not None:
            self._introduction.listen_as = tuple(listen_as)
        if roles is not None:
            self._introduction.roles = tuple(roles)

    async def listen(self, address: Multiaddr) -> Multiaddr:
        """Accept connections at this address too. Returns it with its real port. Raises OSError."""
        bound: Multiaddr = await self._nursery.start(self._transport.listen, address.with_peer(None), self._runs.serve)
        self.listen_addresses += (bound,)
        return bound

    async def _to_ourselves(self) -> PeerConnection:
        if self._loopback is None or self._loopback.lost is not None:
            self._loopback, run = loopback(
                self.peer_id, self.handlers, self._introduction, self.containment, self._limits
            )
            self._nursery.start_soon(self._contained, run, "the connection to ourselves")
        connection = self._loopback
        await connection.wait_hello()
        return connection

    async def _contained(self, run: Callable[[], Awaitable[None]], what: str) -> None:
        with self.containment.around(what):
            await run()

    # Accepting.

    def may_enter(self, relay: Carrier) -> bool:
        """Whether one more unproven peer may come through a relay."""
        return self._runs.has_room(relay.remote_ip)

    async def take(self, channel: CircuitChannel) -> None:
        """Serve the connection of a caller that came through a relay, until it ends."""
        await self._runs.serve(channel)


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
    may_be_relayed: bool = True,
    may_punch: bool = True,
    dial_rules: DialRules | None = None,
    limits: Limits | None = None,
    now: Callable[[], float] = time.time,
    containment: Containment | None = None,
    buffer_bytes: int = DEFAULT_TOTAL_BYTES,
    room: ConnectionLimits | None = None,
    meters: Meters | None = None,
) -> AsyncIterator[Connections]:
    """Listen, and yield connections that can dial. At the end every connection is closed within a second.

    swarm_key: the private swarm's 32 bytes. agent, roles, now: what our hellos say; `now` is in seconds since 1970.
    may_be_relayed: whether we reach others through relays if there is no other way.
    may_punch: whether relays may tell the peers that we reach through them our IP address.
    dial_rules: which addresses may be dialled; None means all.
    containment: handles bugs, also those in handlers; None makes one for these connections.
    buffer_bytes: how many bytes peers may make us hold in buffers, over all connections.
    room: how many peers may dial us; None means as many as the process's limit of descriptors allows.
    meters: what this peer counts and times; None makes one for these connections.
    Raises OSError for an address on which we cannot listen.
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
            may_be_relayed=may_be_relayed,
            may_punch=may_punch,
            dial_rules=dial_rules or DialRules(),
            limits=limits or Limits(),
            now=now,
            containment=containment or Containment(),
            buffer_bytes=buffer_bytes,
            room=room or connection_limits(descriptor_limit()),
            meters=meters or Meters(),
        )
        try:
            for address in listen:
                await connections.listen(address)
            yield connections
        finally:
            shelter.cancel()


async def _shelter(task_status: trio.TaskStatus[tuple[trio.CancelScope, trio.Nursery]]) -> None:
    """A nursery that lives until its own scope is cancelled.

    The user of the connections may be cancelled and still have a last message to send over them. The nursery lets it
    leave.
    """
    # If we are cancelled here, no code would hold the scope that ends the nursery, so stop before starting it.
    await trio.lowlevel.checkpoint_if_cancelled()
    with trio.CancelScope(shield=True) as scope:
        async with trio.open_nursery() as nursery:
            task_status.started((scope, nursery))
            await trio.sleep_forever()

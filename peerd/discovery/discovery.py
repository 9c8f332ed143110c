"""Finds other peers and makes this one findable: runs the DHT over our connections for as long as the peer runs.

It decides when to join, announce, refresh and leave, and owns the files that survive a restart. Messages on streams are
in `dht_streams.py`; what a record means is decided in `routing/`. Two moments are hard. A peer whose bootstrap peers
are all down must join as soon as one of them is back. A peer that leaves must say so while others are still connected
to it.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

import trio

from peerd.discovery.dht_streams import StreamTransport, answer_question
from peerd.discovery.rechecks import Proofs
from peerd.discovery.state_files import StateFiles, Write
from peerd.net.connections import Connections, PeerConnection, Stream
from peerd.net.dial_policy import DialPolicy
from peerd.net.owners import network_of
from peerd.net.sleep_watch import watch_sleep
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectionLost
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.records.bodies import MAX_ADDRESSES, MAX_RELAYS
from peerd.protocol.records.envelope import Announcement, ModelRecord, PeerRecord, ServerRecord
from peerd.routing.clock import SwarmClock
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.messages import DHT_PROTOCOL
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import Contact
from peerd.routing.directory.announcer import Announcer
from peerd.routing.directory.directory import Directory
from peerd.routing.failures.track_record import TrackRecord
from peerd.trio_tools import open_tasks

log = logging.getLogger(__name__)

# How long `open_discovery` waits to join the swarm before its caller goes on without.
JOIN_WAIT_S = 5.0
# The wait between attempts to join while no peer answers.
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0
REFRESH_S = 60.0
REUNITE_S = 600.0
MEASURE_S = 5.0
# A connection that survived our sleep answers within this; a peer that gave us up resets the connection at once.
AWAKE_S = 1.0
# The time for taking back our announcements when we leave.
LEAVE_S = 5.0
CANCELLED_LEAVE_S = 0.5


class Discovery:
    """A peer's view of the swarm, made by `open_discovery`.

    `dht`, `directory`, `track_record` and `clock` may be used by every caller. It announces what `announce_from`
    was given, with the addresses at which others can reach us.
    """

    def __init__(
        self,
        connections: Connections,
        identity: Identity,
        bootstrap: Sequence[Multiaddr],
        state: StateFiles,
        random: Random,
        clock: SwarmClock,
    ) -> None:
        self.clock = clock
        self.track_record = TrackRecord(trio.current_time, by_proof=True)
        self._connections = connections
        # Strangers must not aim us at our own network. But if we joined a swarm in a private range, its peers live
        # there.
        connections.strangers_policy = DialPolicy(lambda: (*self._bootstrap, *self.dht.addresses))
        self._transport = StreamTransport(connections)
        self.dht = Dht(identity.peer_id, self._transport, RecordStore(clock), now=clock, random=random)
        self.directory = Directory(self.dht, clock, self.dht.odd_times)
        self._proofs = Proofs(connections, self.track_record, self.directory, self.may_dial)
        self._bootstrap = tuple(bootstrap)
        self._state = state
        self._random = random
        self._addresses: tuple[Multiaddr, ...] = ()
        self._relays: tuple[Multiaddr, ...] = ()
        self._moved = trio.Event()
        self._alone = trio.Event()
        self._spans: Callable[[], Sequence[ServerRecord]] = tuple
        self._models: Callable[[], Sequence[ModelRecord]] = tuple
        self._announcer = Announcer(identity, self.dht, self._state, self._announcements, clock)

    def __repr__(self) -> str:
        return f"<Discovery of {self.dht!r}>"

    def reachable_at(self, addresses: Sequence[Multiaddr], contacts: Sequence[Multiaddr] | None = None) -> None:
        """Set where others can dial us from now on.

        contacts: the addresses that every peer can dial, if not all can; the DHT's routing tables hold these. Without
            any we are a DHT client.
        """
        contacts = addresses if contacts is None else contacts
        before = self.dht.addresses
        self.dht.addresses = contacts
        if self.dht.addresses != before:
            self._moved.set()
        if tuple(addresses) != self._addresses:
            self._addresses = tuple(addresses)
            self.announce_soon()

    def relayed_by(self, relays: Sequence[Multiaddr]) -> None:
        """Set the relays through which others reach us from now on: their addresses, each with the relay's PeerId."""
        if self._relays != tuple(relays):
            self._relays = tuple(relays)
            self.announce_soon()

    def contacts(self) -> list[Contact]:
        """The peers that we know, bootstrap peers first, each with those of its addresses that we may dial."""
        known = [*_contacts_of(self._bootstrap), *self.dht.contacts]
        return [Contact(one.peer_id, self.may_dial(one.addresses)) for one in known]

    def may_dial(self, addresses: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
        """The given addresses without those that may not be dialled: addresses in our own network, unless the swarm is
        there.
        """
        return self._connections.strangers_policy.of(addresses)

    def announce_from(
        self, spans: Callable[[], Sequence[ServerRecord]], models: Callable[[], Sequence[ModelRecord]] = tuple
    ) -> None:
        """Announce what these return; they are called at each announcement. `seq` and `expires` are filled in."""
        self._spans, self._models = spans, models
        self.announce_soon()

    def announce_soon(self) -> None:
        """Announce soon, because what we serve has changed."""
        self._announcer.announce_soon()

    async def wait_announced(self) -> None:
        """Wait until what we serve now has been announced: a peer that looks for it from then on finds it."""
        await self._announcer.wait_announced()

    async def answer(self, stream: Stream) -> None:
        """Handle a stream of the DHT's protocol."""
        await answer_question(self.dht, stream)

    def _announcements(self) -> list[Announcement]:
        spans = self._spans()
        if not spans:
            # A peer that serves nothing need not be found in the directory.
            return []
        addresses = tuple(str(address.with_peer(None)) for address in self._addresses[:MAX_ADDRESSES])
        relays = tuple(str(relay) for relay in self._relays[:MAX_RELAYS])
        peer = PeerRecord(seq=0, expires=0.0, addresses=addresses, relays=relays).fitted()
        return [*spans, peer, *self._models()]

    async def run(self, joined: trio.Event) -> None:
        """Join, then announce and keep what we know fresh, until cancelled. `joined` is set when the first attempt has
        ended.
        """
        contacts = [*_contacts_of(self._bootstrap), *self._state.load_contacts()]
        async with trio.open_nursery() as nursery:
            with self._hearing_clocks(nursery), self._noticing_when_alone():
                self._keep(nursery, "measuring delays", self._measure)
                self._keep(nursery, "asking doubted peers", self._proofs.run)
                self._keep(nursery, "looking for newcomers", self.dht.meet_newcomers)
                self._keep(nursery, "watching for sleep", watch_sleep, self.clock.system, self._wake)
                self._keep(nursery, "joining the swarm", self._join, contacts, joined)
                await joined.wait()
                self._keep(nursery, "introducing ourselves", self._introduce)
                self._keep(nursery, "looking for a lost part of the swarm", self._reunite)
                self._keep(nursery, "coming back to the swarm", self._come_back)
                self._keep(nursery, "announcing", self._announcer.run)
                await self._connections.containment.keep_running(self._refresh, what="refreshing contacts")

    def _keep(self, nursery: trio.Nursery, what: str, run: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a task as long as we live. If it fails it starts again, and the other tasks go on."""
        nursery.start_soon(partial(self._connections.containment.keep_running, run, *arguments, what=what))

    @contextmanager
    def _hearing_clocks(self, nursery: trio.Nursery) -> Iterator[None]:
        """Inside this context, estimate the time from the clocks of the peers that we dial."""

        def observer(connection: PeerConnection) -> None:
            if connection.dialled:
                self.track_record.reached(connection.peer_id, network_of(connection.accountable_ip))
            contained = self._connections.containment.contained
            nursery.start_soon(partial(contained, self._hear_clock, connection, what="hearing a clock"))

        for connection in self._connections.live.values():
            observer(connection)
        self._connections.on_connected.append(observer)
        try:
            yield
        finally:
            self._connections.on_connected.remove(observer)

    @contextmanager
    def _noticing_when_alone(self) -> Iterator[None]:
        def observer(_: PeerConnection) -> None:
            if not self._connections.live:
                self._alone.set()

        self._connections.on_lost.append(observer)
        try:
            yield
        finally:
            self._connections.on_lost.remove(observer)

    async def _come_back(self) -> None:
        """Whenever all connections are lost at once, ask known peers until one answers; no other peer looks for us."""
        while True:
            await self._alone.wait()
            retry_s = FIRST_RETRY_S
            while not self._connections.live:
                log.debug("nobody is connected: looking for those we knew")
                await self.dht.introduce()
                await trio.sleep(retry_s * self._random.uniform(0.8, 1.2))
                retry_s = min(2 * retry_s, MAX_RETRY_S)
            self._alone = trio.Event()

    async def _hear_clock(self, connection: PeerConnection) -> None:
        with suppress(ConnectionLost):
            hello = await connection.wait_hello()
            # A stranger may dial us many times under different names, so only the clocks of peers that we dialled
            # count.
            if connection.dialled:
                self.clock.observed(connection.peer_id, hello.time_us / 1e6, network_of(connection.accountable_ip))

    async def _wake(self, slept_s: float) -> None:
        """After a sleep: close dead connections, forgive failures, and announce anew.

        Other peers gave us up while we slept, and our announcements have expired.
        """
        log.info("this peer slept for %.0f s", slept_s)
        async with trio.open_nursery() as nursery:
            for connection in self._connections.live.values():
                nursery.start_soon(self._ask_after_sleep, connection)
        self.track_record.forgive()
        await self.dht.introduce()
        self.announce_soon()

    async def _ask_after_sleep(self, connection: PeerConnection) -> None:
        if not await connection.answers(AWAKE_S):
            connection.close("silent", "we slept, and the peer no longer answers")

    async def _measure(self) -> None:
        """Record the round-trip times that the connections' own pings measured."""
        while True:
            for peer_id, connection in self._connections.live.items():
                if connection.rtt_s is not None:
                    self.track_record.measured(peer_id, connection.rtt_s)
            await trio.sleep(MEASURE_S)

    async def _join(self, contacts: list[Contact], tried: trio.Event) -> None:
        """Try to join until a peer answers, with growing pauses."""
        retry_s = FIRST_RETRY_S
        while contacts and not await self.dht.bootstrap(contacts):
            if not tried.is_set():
                log.warning("none of %d known peers answers; trying again", len(contacts))
            tried.set()
            await trio.sleep(retry_s * self._random.uniform(0.8, 1.2))
            retry_s = min(2 * retry_s, MAX_RETRY_S)
        tried.set()
        # So far our announcement was stored only by ourselves.
        self.announce_soon()

    async def _introduce(self) -> None:
        """Tell our neighbours in the DHT each time the addresses at which others can dial us have changed."""
        self._moved = trio.Event()
        while True:
            await self._moved.wait()
            self._moved = trio.Event()
            await self.dht.introduce()

    async def _reunite(self) -> None:
        """Check now and then whether there is another part of the swarm, which our table does not contain."""
        while True:
            await trio.sleep(REUNITE_S * self._random.uniform(0.5, 1.5))
            if await self.dht.reunite():
                # What we serve was announced to one part alone.
                self.announce_soon()

    async def _refresh(self) -> None:
        while True:
            await trio.sleep(REFRESH_S)
            await self.dht.refresh()
            await self._state.save_contacts(self.dht)

    async def leave(self) -> None:
        """Take back what we announced, and save our contacts for the next start. Takes at most 10 s."""
        cancelled = trio.current_effective_deadline() == -math.inf
        with trio.move_on_after(CANCELLED_LEAVE_S if cancelled else LEAVE_S, shield=True):
            await self._announcer.leave()
        with trio.move_on_after(CANCELLED_LEAVE_S if cancelled else LEAVE_S, shield=True):
            await self._state.save_contacts(self.dht)


@asynccontextmanager
async def open_discovery(
    connections: Connections,
    identity: Identity,
    bootstrap: Sequence[Multiaddr],
    *,
    state_dir: Path | None,
    write: Write | None = None,
    random: Random,
    clock: SwarmClock,
    addresses: Sequence[Multiaddr] = (),
    contacts: Sequence[Multiaddr] | None = None,
) -> AsyncIterator[Discovery]:
    """Join the swarm through `bootstrap` or the saved contacts. At the end, leave it over the same connections.

    Yields once a peer has answered, or after 5 s; then it goes on trying.

    addresses, contacts: see `Discovery.reachable_at`.
    state_dir: the folder for the routing table and the last `seq`; None for a peer that will not start again.
    write: replaces a file in `state_dir`; None does so in a worker thread.

    Raises ValueError for a bootstrap address without a PeerId.
    """
    discovery = Discovery(connections, identity, bootstrap, StateFiles(state_dir, write), random, clock)
    discovery.reachable_at(addresses, contacts)
    # The handler must be there before other peers hear of us.
    connections.handlers[DHT_PROTOCOL] = discovery.answer
    try:
        async with open_tasks() as nursery:
            joined = trio.Event()
            nursery.start_soon(discovery.run, joined)
            with trio.move_on_after(JOIN_WAIT_S):
                await joined.wait()
            yield discovery
    finally:
        await discovery.leave()


def _contacts_of(bootstrap: Sequence[Multiaddr]) -> list[Contact]:
    """One contact for each peer, with all of its addresses."""
    addresses: dict[PeerId, list[Multiaddr]] = defaultdict(list)
    for address in bootstrap:
        if address.peer_id is None:
            raise ValueError(f"{address} must say whom it leads to: add /p2p/PEER_ID")
        addresses[address.peer_id].append(address.with_peer(None))
    return [Contact(peer_id, tuple(known)) for peer_id, known in addresses.items()]

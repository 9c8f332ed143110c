"""Finding others and being found: the DHT over our connections, kept alive for as long as a peer runs.

Knows when to join, announce, refresh and leave, and the files that outlive a restart; what is said on
streams is `dht_streams`' business, what a record means `routing`'s. The difficulty is starting
and ending: a swarm whose bootstrap peers sleep must be joined as soon as one wakes, and who leaves must
say so while there is still somebody connected to hear it.
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
from peerd.routing.failures.track_record import Links
from peerd.trio_tools import open_tasks

log = logging.getLogger(__name__)

# How long `open_discovery` waits for the swarm before it lets its caller begin without.
JOIN_WAIT_S = 5.0
# Between attempts to join while nobody answers.
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0
REFRESH_S = 60.0
MEASURE_S = 5.0
# Connections that outlived our sleep answer within this; whoever gave us up resets them at once.
AWAKE_S = 1.0
# For saying goodbye.
LEAVE_S = 5.0
CANCELLED_LEAVE_S = 0.5


class Discovery:
    """A peer's view of the swarm, made by `open_discovery`.

    dht, directory, links and clock are for anybody to use. What is announced is what `serve` was given,
    together with where we can be reached.
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
        self.links = Links(trio.current_time, by_proof=True)
        self._connections = connections
        # Strangers must not aim us at our own network; but a swarm that we joined in a private range lives there.
        connections.strangers_policy = DialPolicy(lambda: (*self._bootstrap, *self.dht.addresses))
        self._transport = StreamTransport(connections)
        self.dht = Dht(identity.peer_id, self._transport, RecordStore(clock), now=clock, random=random)
        self.directory = Directory(self.dht, clock)
        self._proofs = Proofs(connections, self.links, self.directory, self.may_dial)
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
        """Say where others can dial us from now on.

        contacts: what of it everybody can dial, if not all; the DHT's tables hold that. None of it: a DHT client.
        """
        contacts = addresses if contacts is None else contacts
        before = self.dht.addresses
        self.dht.addresses = contacts
        if self.dht.addresses != before:
            self._moved.set()
        if tuple(addresses) != self._addresses:
            self._addresses = tuple(addresses)
            self.changed()

    def relayed_by(self, relays: Sequence[Multiaddr]) -> None:
        """Say through which relays others reach us from now on: their addresses, each with the relay's PeerId."""
        if self._relays != tuple(relays):
            self._relays = tuple(relays)
            self.changed()

    def contacts(self) -> list[Contact]:
        """Whom we know, bootstrap peers first, each at the addresses that we may dial."""
        known = [*_contacts_of(self._bootstrap), *self.dht.contacts]
        return [Contact(one.peer_id, self.may_dial(one.addresses)) for one in known]

    def may_dial(self, addresses: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
        """Of addresses that others told us, those that may be dialled: none of our own network, unless the swarm is."""
        return self._connections.strangers_policy.of(addresses)

    def describe(self, models: Callable[[], Sequence[ModelRecord]]) -> None:
        """Announce what `models` returns beside what we serve, asked each time."""
        self._models = models

    def serve(self, spans: Callable[[], Sequence[ServerRecord]]) -> None:
        """Announce what `spans` returns, asked each time; `seq` and `expires` are filled in."""
        self._spans = spans
        self.changed()

    def changed(self) -> None:
        """What we serve has changed: announce it soon."""
        self._announcer.changed()

    async def announced(self) -> None:
        """Wait until what we serve now was announced: who looks for it from then on finds it."""
        await self._announcer.announced()

    async def answer(self, stream: Stream) -> None:
        """Handle a stream of the DHT's protocol."""
        await answer_question(self.dht, stream)

    def _announcements(self) -> list[Announcement]:
        spans = self._spans()
        if not spans:
            # Whoever serves nothing need not be found by everybody.
            return []
        addresses = tuple(str(address.with_peer(None)) for address in self._addresses[:MAX_ADDRESSES])
        relays = tuple(str(relay) for relay in self._relays[:MAX_RELAYS])
        peer = PeerRecord(seq=0, expires=0.0, addresses=addresses, relays=relays).fitted()
        return [*spans, peer, *self._models()]

    async def run(self, joined: trio.Event) -> None:
        """Join, then announce, and keep what we know fresh, until cancelled. `joined`: the first attempt has ended."""
        contacts = [*_contacts_of(self._bootstrap), *self._state.load_contacts()]
        async with trio.open_nursery() as nursery:
            with self._hearing_clocks(nursery), self._noticing_when_alone():
                self._keep(nursery, "measuring delays", self._measure)
                self._keep(nursery, "asking doubted peers", self._proofs.run)
                self._keep(nursery, "watching for sleep", watch_sleep, self.clock.system, self._wake)
                self._keep(nursery, "joining the swarm", self._join, contacts, joined)
                await joined.wait()
                self._keep(nursery, "introducing ourselves", self._introduce)
                self._keep(nursery, "coming back to the swarm", self._come_back)
                self._keep(nursery, "announcing", self._announcer.run)
                await self._connections.containment.keep_running(self._refresh, what="refreshing contacts")

    def _keep(self, nursery: trio.Nursery, what: str, run: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a task as long as we live: one that fails starts again, and costs none of the others."""
        nursery.start_soon(partial(self._connections.containment.keep_running, run, *arguments, what=what))

    @contextmanager
    def _hearing_clocks(self, nursery: trio.Nursery) -> Iterator[None]:
        """Hear what time it is from everybody we are connected to."""

        def observer(connection: PeerConnection) -> None:
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
        """Whoever lost all connections at once is not looked for by anybody: look for the others, until one answers."""
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
            # Whoever dials us may be the same stranger many times over; whom we dial we chose.
            if connection.dialled:
                self.clock.observed(connection.peer_id, hello.time_us / 1e6)

    async def _wake(self, slept_s: float) -> None:
        """Others gave us up while we slept, and what we announced has ended: see whom we still have, and return."""
        log.info("this peer slept for %.0f s", slept_s)
        async with trio.open_nursery() as nursery:
            for connection in self._connections.live.values():
                nursery.start_soon(self._ask_after_sleep, connection)
        self.links.forgive()
        await self.dht.introduce()
        self.changed()

    async def _ask_after_sleep(self, connection: PeerConnection) -> None:
        if not await connection.answers(AWAKE_S):
            connection.close("silent", "we slept, and the peer no longer answers")

    async def _measure(self) -> None:
        """Note what the connections' own pings measured."""
        while True:
            for peer_id, connection in self._connections.live.items():
                if connection.rtt_s is not None:
                    self.links.measured(peer_id, connection.rtt_s)
            await trio.sleep(MEASURE_S)

    async def _join(self, contacts: list[Contact], tried: trio.Event) -> None:
        """Try until somebody answers, ever more seldom."""
        retry_s = FIRST_RETRY_S
        while contacts and not await self.dht.bootstrap(contacts):
            if not tried.is_set():
                log.warning("none of %d known peers answers; trying again", len(contacts))
            tried.set()
            await trio.sleep(retry_s * self._random.uniform(0.8, 1.2))
            retry_s = min(2 * retry_s, MAX_RETRY_S)
        tried.set()
        # What we serve was announced to nobody but ourselves so far.
        self.changed()

    async def _introduce(self) -> None:
        """Let our neighbours in the DHT hear where we can be dialled now, or that we no longer can be."""
        self._moved = trio.Event()
        while True:
            await self._moved.wait()
            self._moved = trio.Event()
            await self.dht.introduce()

    async def _refresh(self) -> None:
        while True:
            await trio.sleep(REFRESH_S)
            await self.dht.refresh()
            await self._state.save_contacts(self.dht)

    async def leave(self) -> None:
        """Take back what we announced, and keep whom we know for the next start. Takes at most 10 s."""
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
    """Join the swarm through `bootstrap` or the peers known before; leave it at the end, over the same connections.

    Yields once somebody answered, or after 5 s, and goes on trying. addresses, contacts: see
    `Discovery.reachable_at`.
    state_dir: where the routing table and the last `seq` are kept; None for a peer that nobody will meet
    again. write: replaces a file there; None does so in a worker thread. Raises ValueError for a bootstrap address
    without a PeerId.
    """
    discovery = Discovery(connections, identity, bootstrap, StateFiles(state_dir, write), random, clock)
    discovery.reachable_at(addresses, contacts)
    # Before anybody hears of us.
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
    """One contact a peer, with all its addresses."""
    addresses: dict[PeerId, list[Multiaddr]] = defaultdict(list)
    for address in bootstrap:
        if address.peer_id is None:
            raise ValueError(f"{address} must say whom it leads to: add /p2p/PEER_ID")
        addresses[address.peer_id].append(address.with_peer(None))
    return [Contact(peer_id, tuple(known)) for peer_id, known in addresses.items()]

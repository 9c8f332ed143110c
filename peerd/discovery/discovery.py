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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

import trio

from peerd.discovery.dht_streams import StreamTransport, answer_question
from peerd.discovery.encounters import Encounters
from peerd.discovery.joining import Joining
from peerd.discovery.own_records import Models, OwnRecords, Spans
from peerd.discovery.question_rates import QuestionRates
from peerd.discovery.rechecks import Rechecks
from peerd.discovery.state_files import StateFiles, Write
from peerd.net.connections import Connections, PeerConnection, Stream
from peerd.net.sleep_watch import watch_sleep
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest, PeerFault
from peerd.protocol.identity import Identity, PeerId
from peerd.routing.clock import SwarmClock
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.messages import DHT_PROTOCOL
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import Contact
from peerd.routing.directory.announcer import Announcer
from peerd.routing.directory.directory import Directory
from peerd.routing.failures.contributions import Contributions
from peerd.routing.failures.convictions import Convictions
from peerd.routing.failures.receipts import ReceiptBook
from peerd.routing.failures.track_record import TrackRecord
from peerd.routing.reach.verdict import Whereabouts
from peerd.trio_tools import Watched, open_tasks

log = logging.getLogger(__name__)

# How long `open_discovery` waits to join the swarm before its caller goes on without.
JOIN_WAIT_S = 5.0
REFRESH_S = 60.0
REUNITE_S = 600.0
# The time to look up a peer's addresses, dial it and hear from it.
REACH_S = 5.0
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
        where: Watched[Whereabouts],
    ) -> None:
        self.clock = clock
        convictions = Convictions(clock)
        state.load_convictions(convictions)
        #: What peers gave us, for which our server gives them more.
        self.contributions = Contributions(clock.system)
        state.load_contributions(self.contributions)
        self.track_record = TrackRecord(
            trio.current_time, by_proof=True, convictions=convictions, on_served=self.contributions.served_us
        )
        #: What our server's clients acknowledged.
        self.receipts = ReceiptBook(clock)
        state.load_receipts(self.receipts)
        self._connections = connections
        self._transport = StreamTransport(connections)
        self.dht = Dht(identity.peer_id, self._transport, RecordStore(clock), now=clock, random=random)
        self.directory = Directory(self.dht, clock, self.dht.odd_times)
        self._encounters = Encounters(connections, self.directory, self.track_record, self.contributions, clock)
        self._rechecks = Rechecks(connections, self.track_record, self.directory, self.may_dial)
        self._bootstrap = tuple(bootstrap)
        self._state = state
        self._random = random
        self._where = where
        self._own = OwnRecords()
        self._question_rates = QuestionRates()
        self._joining = Joining(connections, self.dht, random)
        self._moved = trio.Event()
        self._announcer = Announcer(identity, self.dht, self._state, self._own.now, clock)
        self._move(where.value)

    def __repr__(self) -> str:
        return f"<Discovery of {self.dht!r}>"

    def _move(self, where: Whereabouts) -> None:
        """Others can reach us there from now on."""
        known = self.dht.addresses
        self.dht.addresses = where.contacts
        if self.dht.addresses != known:
            self._moved.set()
        before, self._own.where = self._own.where, where
        if (where.addresses, where.relays) != (before.addresses, before.relays):
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

    async def meet(self, contact: Contact) -> bool:
        """Get to know a peer that somebody else than the DHT has named. Returns whether it answered."""
        if not await self.dht.meet(contact):
            return False
        # If we knew nobody so far, only we ourselves have our announcement.
        self.announce_soon()
        return True

    async def reaches(self, peer_id: PeerId) -> bool:
        """Whether the peer answers us now, connected or dialled at its announced addresses. Takes at most 5 s."""
        with trio.move_on_after(REACH_S), suppress(PeerFault, InvalidRequest):
            ways = self.may_dial(await self.directory.ways_to(peer_id))
            connection = await self._connections.connect(peer_id, ways, self._connections.strangers_policy)
            return await connection.answers(REACH_S)
        return False

    def is_absent(self, peer_id: PeerId) -> bool:
        """Whether we tried to reach the peer lately and never found it."""
        return self.track_record.standing(peer_id).is_absent

    def is_reached(self, peer_id: PeerId) -> bool:
        """Whether we reached the peer before."""
        return self.track_record.standing(peer_id).is_reached

    def announce_from(self, spans: Spans, models: Models = tuple) -> None:
        """Announce what these return; they are called at each announcement. `seq` and `expires` are filled in."""
        self._own.spans, self._own.models = spans, models
        self.announce_soon()

    def announce_soon(self) -> None:
        """Announce soon, because what we serve has changed."""
        self._announcer.announce_soon()

    async def wait_announced(self) -> None:
        """Wait until what we serve now has been announced: a peer that looks for it from then on finds it."""
        await self._announcer.wait_announced()

    async def convict(self, peer_id: PeerId, why: str) -> None:
        """Avoid a peer for a day, because it computed something else than others, and remember that across restarts."""
        log.warning("%s is avoided for a day: %s", peer_id, why)
        self.track_record.convictions.convict(peer_id, why)
        await self._state.save_convictions(self.track_record.convictions)

    async def answer(self, stream: Stream) -> None:
        """Handle a stream of the DHT's protocol."""
        await answer_question(self.dht, self._question_rates, stream)

    async def run(self, joined: trio.Event) -> None:
        """Join, then announce and keep what we know fresh, until cancelled. `joined` is set when the first attempt has
        ended.
        """
        contacts = [*_contacts_of(self._bootstrap), *self._state.load_contacts()]
        async with trio.open_nursery() as nursery:

            def note_connected(connection: PeerConnection) -> None:
                self._encounters.met(connection)
                contained = self._connections.containment.contained
                nursery.start_soon(partial(contained, self._encounters.hear_clock, connection, what="hearing a clock"))

            with self._connections.watching(connected=note_connected, lost=self._joining.note_lost):
                self._keep(nursery, "following where others reach us", self._where.follow, self._move)
                self._keep(nursery, "measuring delays", self._encounters.measure)
                self._keep(nursery, "asking doubted peers", self._rechecks.run)
                self._keep(nursery, "looking for newcomers", self.dht.meet_newcomers)
                self._keep(nursery, "watching for sleep", watch_sleep, self.clock.system, self._wake)
                self._keep(nursery, "joining the swarm", self._join, contacts, joined)
                await joined.wait()
                self._keep(nursery, "introducing ourselves", self._introduce)
                self._keep(nursery, "looking for a lost part of the swarm", self._reunite)
                self._keep(nursery, "coming back to the swarm", self._joining.come_back)
                self._keep(nursery, "announcing", self._announcer.run)
                await self._connections.containment.keep_running(self._refresh, what="refreshing contacts")

    def _keep(self, nursery: trio.Nursery, what: str, run: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a task as long as we live. If it fails it starts again, and the other tasks go on."""
        nursery.start_soon(partial(self._connections.containment.keep_running, run, *arguments, what=what))

    async def _wake(self, slept_s: float) -> None:
        """After a sleep: close dead connections, forgive failures, and announce anew.

        Other peers gave us up while we slept, and our announcements have expired.
        """
        log.info("this peer slept for %.0f s", slept_s)
        await self._encounters.close_dead()
        self.track_record.forgive()
        await self.dht.introduce()
        self.announce_soon()

    async def _join(self, contacts: list[Contact], tried: trio.Event) -> None:
        await self._joining.join(contacts, tried)
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
            await self._state.save_contributions(self.contributions)
            await self._state.save_receipts(self.receipts)

    async def leave(self) -> None:
        """Take back what we announced, and save our contacts for the next start. Takes at most 10 s."""
        cancelled = trio.current_effective_deadline() == -math.inf
        with trio.move_on_after(CANCELLED_LEAVE_S if cancelled else LEAVE_S, shield=True):
            await self._announcer.leave()
        with trio.move_on_after(CANCELLED_LEAVE_S if cancelled else LEAVE_S, shield=True):
            await self._state.save_contacts(self.dht)
            await self._state.save_contributions(self.contributions)
            await self._state.save_receipts(self.receipts)


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
    where: Watched[Whereabouts] | None = None,
) -> AsyncIterator[Discovery]:
    """Join the swarm through `bootstrap` or the saved contacts. At the end, leave it over the same connections.

    Yields once a peer has answered, or after 5 s; then it goes on trying.

    where: how others can reach us, now and later; None means nowhere.
    state_dir: the folder for the routing table and the last `seq`; None for a peer that will not start again.
    write: replaces a file in `state_dir`; None does so in a worker thread.

    Raises ValueError for a bootstrap address without a PeerId.
    """
    where = where or Watched(Whereabouts())
    discovery = Discovery(connections, identity, bootstrap, StateFiles(state_dir, write), random, clock, where)
    # The handler must be there before other peers hear of us.
    connections.handle(DHT_PROTOCOL, discovery.answer)
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
            raise ValueError(f"{address} has no PeerId: add /p2p/PEERID")
        addresses[address.peer_id].append(address.with_peer(None))
    return [Contact(peer_id, tuple(known)) for peer_id, known in addresses.items()]

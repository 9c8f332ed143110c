"""Makes a peer reachable that nobody can dial: holds reservations at relays, and takes the circuits that come from
them.

`reach/checker.py` decides whether reservations are `wanted`; `on_change` is told where the relays are. Relays come, go
and refuse. So two tasks look for one relay each, never the same one, and a relay that refused or was lost is left alone
for a while, each time for longer.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from random import Random
from types import MappingProxyType

import trio

from peerd.net.connections import Connections, PeerConnection, Stream
from peerd.net.dialling.circuits import hear_caller, take_circuit
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import InvalidRequest, NotServed, Overloaded, PeerdError, PeerFault, Unresponsive
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.relay import CIRCUIT_PROTOCOL, RELAY_PROTOCOL, RELAY_ROLE, TO_RESERVED, Reserve, Reserved
from peerd.protocol.messages.session import Failure
from peerd.reach.relay_addresses import addresses_of
from peerd.routing.dht.table import Contact
from peerd.routing.failures.track_record import TrackRecord
from peerd.trio_tools import open_tasks

log = logging.getLogger(__name__)

# If one relay dies, clients find the other in the record that they already have.
WANTED_RELAYS = 2
# The wait between searches that found no relay.
FIRST_SEARCH_S, MAX_SEARCH_S = 2.0, 60.0
# How many strangers from the routing table one search may connect to, to ask whether they are relays.
MAX_ASKED = 8
ASK_S = 15.0
# Relays whose round trips differ by less than this, or by less than a factor of two, count as equally near.
NEAR_S = 0.01
ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """A relay's promise to reach us. `addresses`: where others find that relay, each with its PeerId."""

    relay: PeerId
    addresses: tuple[Multiaddr, ...]
    terms: Reserved


class Reservations:
    """Our reservations at relays. Made by `open_reservations`.

    on_change: called with the new value of `relay_addresses`; it must not wait.
    """

    def __init__(
        self,
        connections: Connections,
        contacts: Callable[[], Sequence[Contact]],
        on_change: Callable[[tuple[Multiaddr, ...]], None],
        random: Random,
    ) -> None:
        self.circuits = 0
        """How many connections that came through relays are open."""
        self._connections = connections
        self._contacts = contacts
        self._on_change = on_change
        self._random = random
        self._held: dict[PeerId, Reservation] = {}
        self._sought: set[PeerId] = set()
        # The relays that refused or left us, and how often. A record of its own, since such a relay may be good for
        # other uses.
        self._faults = TrackRecord(trio.current_time)
        self._is_wanted = trio.Event()
        self._holding: set[trio.CancelScope] = set()

    def __repr__(self) -> str:
        return f"<Reservations wanted={self.wanted} held={len(self._held)} circuits={self.circuits}>"

    @property
    def held(self) -> Mapping[PeerId, Reservation]:
        """The reservations by relay; a live view."""
        return MappingProxyType(self._held)

    @property
    def relay_addresses(self) -> tuple[Multiaddr, ...]:
        """The addresses of our relays, each with the relay's PeerId; the best address of each relay comes first."""
        ranked = zip_longest(*(held.addresses for held in self._held.values()))
        return tuple(address for rank in ranked for address in rank if address is not None)

    @property
    def wanted(self) -> bool:
        """Whether we need relays because others cannot dial us. Setting False gives all reservations back."""
        return self._is_wanted.is_set()

    @wanted.setter
    def wanted(self, wanted: bool) -> None:
        if wanted == self.wanted:
            return
        if wanted:
            log.info("nobody can dial us: looking for relays")
            self._is_wanted.set()
        else:
            log.info("no relays needed any more")
            self._is_wanted = trio.Event()
            for scope in self._holding:
                scope.cancel()

    async def run(self) -> None:
        """Hold as many reservations as we want, whenever they are wanted, until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(WANTED_RELAYS):
                keep = self._connections.containment.keep_running
                nursery.start_soon(partial(keep, self._keep_one, what="holding a reservation"))

    async def answer(self, stream: Stream) -> None:
        """Handle a circuit that a relay brings, for as long as it is open."""
        try:
            with trio.fail_after(ANSWER_S):
                call = await hear_caller(stream)
        except trio.TooSlowError:
            stream.reset(Unresponsive.code)
            return
        if (refusal := self._refusal(stream, call.peer)) is not None:
            log.debug("refused a circuit from %s through %s: %s", call.peer, stream.peer, refusal)
            await stream.send(Failure.of(refusal).to_header(), priority=Priority.CONTROL)
            return
        log.debug("accepted a circuit from %s through the relay %s", call.peer, stream.peer)
        self.circuits += 1
        try:
            await self._connections.take(take_circuit(stream, call))
        finally:
            self.circuits -= 1

    def _refusal(self, stream: Stream, caller: PeerId) -> PeerdError | None:
        if stream.peer not in self._held or stream.connection.relay is not None:
            return NotServed("we have no reservation here")
        if caller in (stream.peer, self._connections.peer_id):
            return InvalidRequest("a circuit comes from a third peer")
        if not self._connections.may_enter(stream.connection):
            return Overloaded("too many unproven connections")
        return None

    # Holding one reservation.

    async def _keep_one(self) -> None:
        search_s = FIRST_SEARCH_S
        while True:
            await self._is_wanted.wait()
            with trio.CancelScope() as scope:
                self._holding.add(scope)
                try:
                    relay = await self._find()
                    if relay is not None:
                        search_s = FIRST_SEARCH_S
                        await self._hold(relay)
                        continue
                    await trio.sleep(search_s * self._random.uniform(0.8, 1.2))
                    search_s = min(2 * search_s, MAX_SEARCH_S)
                finally:
                    self._holding.discard(scope)

    async def _hold(self, relay: PeerConnection) -> None:
        """Make a reservation there, and return when it is lost."""
        peer = relay.peer_id
        self._sought.add(peer)
        try:
            async with relay.open_stream(RELAY_PROTOCOL) as stream:
                try:
                    await self._renew_for_ever(relay, stream)
                finally:
                    self._lose(peer)
        except (PeerdError, trio.EndOfChannel) as error:
            again_s = self._faults.failed(peer)
            log.info("no reservation at the relay %s: %s; not asked again for %.0f s", peer, error, again_s)
        finally:
            self._sought.discard(peer)

    async def _renew_for_ever(self, relay: PeerConnection, stream: Stream) -> None:
        while True:
            terms = await _reserve(stream, Reserve(shows_ip=self._connections.may_punch))
            hello = await relay.wait_hello()
            if relay.peer_id not in self._held:
                self._faults.succeeded(relay.peer_id)
                addresses = addresses_of(relay, hello.multiaddrs, self._known(relay.peer_id))
                self._held[relay.peer_id] = Reservation(relay.peer_id, addresses, terms)
                log.info("the relay %s reaches us: %s", relay.peer_id, ", ".join(map(str, addresses)))
                self._on_change(self.relay_addresses)
            with trio.move_on_after(terms.expires_s / 2 * self._random.uniform(0.8, 1.0)):
                # After this the relay sends only one more message, which ends the reservation.
                reply = parse((await stream.receive()).header, (Failure,))
                raise reply.error

    def _lose(self, relay: PeerId) -> None:
        if self._held.pop(relay, None) is not None:
            self._on_change(self.relay_addresses)

    # Finding a relay.

    async def _find(self) -> PeerConnection | None:
        """A connection to a relay that may be asked: one that is open, or else one to a peer of the routing table."""
        found = [connection for connection in self._connections.live.values() if self._is_relay(connection)]
        if found:
            return self._near(found)
        unknown = [
            contact
            for contact in self._contacts()
            if contact.peer_id not in self._connections.live and self._may_ask(contact.peer_id)
        ]
        for contact in self._random.sample(unknown, min(len(unknown), MAX_ASKED)):
            try:
                with trio.fail_after(ASK_S):
                    policy = self._connections.strangers_policy
                    connection = await self._connections.connect(contact.peer_id, contact.addresses, policy)
                    await connection.wait_hello()
            except (PeerFault, trio.TooSlowError):
                continue
            if self._is_relay(connection):
                return connection
            # We wanted only its hello. It is asked again at growing intervals, and the connection is not kept open.
            self._faults.failed(contact.peer_id)
            connection.close_if_unused("measured", "no relay")
        return None

    def _near(self, relays: Sequence[PeerConnection]) -> PeerConnection:
        """One of the nearest relays, because every question to us passes through it twice."""
        rtts_s = [connection.rtt_s or 0.0 for connection in relays]
        near_s = 2 * min(rtts_s) + NEAR_S
        return self._random.choice([relay for relay, rtt_s in zip(relays, rtts_s, strict=True) if rtt_s <= near_s])

    def _is_relay(self, connection: PeerConnection) -> bool:
        hello = connection.hello
        return (
            hello is not None
            and RELAY_ROLE in hello.roles
            and connection.relay is None
            and connection.lost is None
            and self._may_ask(connection.peer_id)
        )

    def _may_ask(self, peer: PeerId) -> bool:
        return peer not in self._sought and not self._faults.is_avoided(peer) and peer != self._connections.peer_id

    def _known(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        return tuple(
            address for contact in self._contacts() if contact.peer_id == peer for address in contact.addresses
        )


async def _reserve(stream: Stream, asked: Reserve) -> Reserved:
    """Ask the relay for a reservation, or renew it. Raises the error with which the relay refuses, or a PeerFault."""
    try:
        with trio.fail_after(ANSWER_S):
            await stream.send(asked.to_header())
            reply = parse((await stream.receive()).header, TO_RESERVED)
    except trio.TooSlowError:
        raise PeerFault(f"no answer within {ANSWER_S:g} s") from None
    if isinstance(reply, Failure):
        raise reply.error
    assert isinstance(reply, Reserved)
    return reply


@asynccontextmanager
async def open_reservations(
    connections: Connections,
    contacts: Callable[[], Sequence[Contact]],
    on_change: Callable[[tuple[Multiaddr, ...]], None],
    random: Random,
    *,
    wanted: bool = False,
) -> AsyncIterator[Reservations]:
    """Hold reservations while they are `wanted`, until the block ends. contacts: the peers that we could ask, best
    first.
    """
    reservations = Reservations(connections, contacts, on_change, random)
    reservations.wanted = wanted
    connections.handle(CIRCUIT_PROTOCOL, reservations.answer)
    try:
        async with open_tasks() as tasks:
            tasks.start_soon(reservations.run)
            yield reservations
    finally:
        connections.stop_handling(CIRCUIT_PROTOCOL)

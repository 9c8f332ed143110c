"""How others reach this peer: at its own addresses, through relays, or not at all; and what it relays for them.

Joins the parts of this room. The checker finds out who can dial us; while nobody can, reservations at relays make us
reachable, and we relay for nobody. What follows from all of it is one value, `where`, which discovery announces.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from random import Random

import trio

from peerd.net.connections import Connections
from peerd.net.transport import Transport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL
from peerd.protocol.messages.punch import PUNCH_PROTOCOL
from peerd.protocol.messages.relay import RELAY_PROTOCOL, RELAY_ROLE
from peerd.reach.checker import ReachChecker, ReachReport, ReachState
from peerd.reach.dialback import DialbackAnswerer
from peerd.reach.own_addresses import dialable_forms
from peerd.reach.puncher import Puncher
from peerd.reach.relay import Relay
from peerd.reach.relay_ledger import RelayLimits
from peerd.reach.reservations import Reservations, open_reservations
from peerd.routing.dht.table import Contact
from peerd.routing.reach.verdict import Reach, Whereabouts
from peerd.trio_tools import Watched, open_tasks

log = logging.getLogger(__name__)


class Reachability:
    """Made by `open_reach`. `where`: how others reach us, now and later.

    relay: what we do for peers that nobody can dial; None where we relay for nobody.
    """

    def __init__(
        self, connections: Connections, checker: ReachChecker, relay: Relay | None, where: Watched[Whereabouts]
    ) -> None:
        self.relay = relay
        self.where = where
        where.set(checker.found.value.where)
        self._connections = connections
        self._checker = checker
        self._reservations: Reservations | None = None
        self._offers_relay = relay is not None
        connections.present_as(listen_as=self.where.value.addresses)

    def __repr__(self) -> str:
        return f"<Reachability {self.reach.value}>"

    @property
    def reach(self) -> Reach:
        """Who can dial us, as far as we know."""
        return self._checker.reach

    @property
    def here(self) -> ReachReport:
        """Who can dial us, where peers see us, and why, for people."""
        return self._checker.here

    @property
    def found(self) -> Watched[ReachState]:
        """What the checker found last."""
        return self._checker.found

    @property
    def reservations(self) -> Reservations | None:
        """What relays do for us; None for a peer that holds no reservations."""
        return self._reservations

    def check_soon(self) -> None:
        """Our network may be another one than before: look again soon."""
        self._checker.check_soon()

    def drain(self) -> None:
        """Relay no more, but what is under way."""
        if self.relay is not None:
            self.relay.draining = True

    async def run(self) -> None:
        """Keep `where` true until cancelled."""
        async with trio.open_nursery() as nursery:
            keep = self._connections.containment.keep_running
            nursery.start_soon(partial(keep, self._checker.run, what="checking who can dial us"))
            nursery.start_soon(partial(keep, self._checker.found.follow, self._take, what="following who can dial us"))

    @asynccontextmanager
    async def holding_reservations(
        self, contacts: Callable[[], Sequence[Contact]], random: Random
    ) -> AsyncIterator[Reservations]:
        """Hold reservations at relays as long as others cannot dial us, and give them back when they can.

        contacts: the peers that may be asked whether they relay, best first.
        """
        wanted = self._checker.found.value.wants_relays
        async with open_reservations(
            self._connections, contacts, self._take_relays, random, wanted=wanted
        ) as reservations:
            self._reservations = reservations
            yield reservations

    def _take(self, found: ReachState) -> None:
        self._connections.present_as(listen_as=found.where.addresses)
        self.where.set(replace(found.where, relays=self.where.value.relays))
        if self._reservations is not None:
            self._reservations.wanted = found.wants_relays
        self._offer_relay(is_reachable=found.reach is not Reach.PRIVATE)

    def _take_relays(self, relays: Sequence[Multiaddr]) -> None:
        self.where.set(replace(self.where.value, relays=tuple(relays)))

    def _offer_relay(self, *, is_reachable: bool) -> None:
        """Say that we relay, unless the peers for which we would cannot dial us."""
        if self.relay is None or is_reachable == self._offers_relay:
            return
        self._offers_relay = is_reachable
        self._connections.present_as(roles=(RELAY_ROLE,) if is_reachable else ())
        if not is_reachable:
            log.warning("nobody can dial us, so this peer does not relay for others")


@asynccontextmanager
async def open_reach(
    connections: Connections,
    transport: Transport,
    *,
    announce: Sequence[Multiaddr] = (),
    bootstrap: Sequence[Multiaddr] = (),
    relay: RelayLimits | None = None,
    swarm_key: bytes | None = None,
    now: Callable[[], float],
    where: Watched[Whereabouts] | None = None,
) -> AsyncIterator[Reachability]:
    """Find out how others reach us, and answer peers that ask the same of us or want us as a relay.

    announce: what an operator wants announced instead of what we listen on. bootstrap: the peers that we join through.
    relay: what to give away as a relay; None: nothing. now: unix seconds, whose jumps betray that we slept.
    where: is kept true from now on; None makes one.
    """
    checker = ReachChecker(
        connections,
        lambda: tuple(announce) or dialable_forms(connections.listen_addresses),
        fixed=bool(announce),
        bootstrap=bootstrap,
        random=Random(os.urandom(16)),
        now=now,
    )
    reachability = Reachability(
        connections, checker, Relay(connections.peer_id, relay) if relay else None, where or Watched(Whereabouts())
    )
    if reachability.relay is not None:
        connections.present_as(roles=(RELAY_ROLE,))
        connections.handle(RELAY_PROTOCOL, reachability.relay.answer)
    if connections.listen_addresses:
        answerer = DialbackAnswerer(transport, lambda: connections.listen_as, swarm_key)
        connections.handle(DIALBACK_PROTOCOL, answerer.answer)
    async with open_tasks() as tasks:
        tasks.start_soon(reachability.run)
        if connections.may_punch and connections.may_be_relayed:
            puncher = Puncher(connections)
            connections.handle(PUNCH_PROTOCOL, puncher.answer)
            keep = connections.containment.keep_running
            tasks.start_soon(partial(keep, puncher.run, what="punching holes"))
        yield reachability

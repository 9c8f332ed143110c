"""Finds out whether others can dial us, and keeps our announced addresses true (spec/discovery/reachability.md).

It decides when to ask which peers; `routing/reach/verdict.py` decides what their answers show. The answer changes: a
laptop sleeps, a router gets another address, a user forwards a port. So peers are asked again, at growing intervals,
and at once when the peers that we dialled see us at another address, when all connections were lost, or when the
machine has slept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

import trio

from peerd.net.connections import Connections, PeerConnection
from peerd.net.sleep_watch import watch_sleep
from peerd.protocol.addresses import IpAddress, Multiaddr, public_network
from peerd.protocol.connection.hello import Hello
from peerd.protocol.errors import ConnectionLost, PeerdError
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL, Dialled
from peerd.reach.dialback import ask_to_be_dialled
from peerd.reach.explaining import explain
from peerd.routing.reach.observed_ips import ObservedIps
from peerd.routing.reach.verdict import (
    Reach,
    Verdict,
    Whereabouts,
    is_void,
    judge,
    more_judges,
    next_check_s,
    ports_for,
    whereabouts,
)
from peerd.trio_tools import Watched, at_once

log = logging.getLogger(__name__)

# News comes in groups: the hellos of several peers that we have just dialled. So we wait this long for the rest.
SETTLE_S = 1.0
# The least time between two rounds of questions. A peer answers once a minute, but there are several.
MIN_GAP_S = 10.0
# How many peers are asked in one round about one address, those that refuse included.
MAX_ASKED = 6


@dataclass(frozen=True, slots=True)
class ReachReport:
    """Where we are, for status displays; `why` is a sentence for people."""

    reach: Reach
    observed: tuple[IpAddress, ...]
    why: str


@dataclass(frozen=True, slots=True)
class ReachState:
    """Which peers can dial us, whether we need relays, and the addresses to announce."""

    reach: Reach
    wants_relays: bool
    where: Whereabouts


class ReachChecker:
    """Whether others can dial us. `run` it; `found` is its last result, and changes.

    own: the addresses on which we listen, as other peers would write them, read anew at each check; with `fixed` they
        are the addresses that the operator wants announced, which are not checked.
    bootstrap: the peers through which we join.
    now: returns unix seconds, whose jumps reveal that the machine slept.
    """

    def __init__(
        self,
        connections: Connections,
        own: Callable[[], Sequence[Multiaddr]],
        *,
        fixed: bool,
        bootstrap: Sequence[Multiaddr],
        random: Random,
        now: Callable[[], float],
    ) -> None:
        self._connections = connections
        self._read_own = own
        self._own = tuple(own())
        self._fixed = fixed
        self._on_internet = any(address.ip is not None and not address.is_private for address in bootstrap)
        self._random = random
        self._now = now
        self._observed = ObservedIps()
        self._verdict = Verdict(Reach.PUBLIC) if fixed else Verdict()
        self._told = ""
        self._due = trio.current_time() + next_check_s(Reach.UNKNOWN, 0, random)
        self._last_check = -MIN_GAP_S
        self._checks = 0
        self._unchanged = 0
        self._waiting = trio.CancelScope()
        self.found = Watched(self._found())

    def __repr__(self) -> str:
        return f"<ReachChecker {self.reach.value} {self._observed!r}>"

    @property
    def reach(self) -> Reach:
        """Which peers can dial us, as far as we know."""
        return self._verdict.reach

    @property
    def here(self) -> ReachReport:
        """`reach`, our observed addresses, and the reason, for people."""
        if not self._connections.listen_addresses:
            return ReachReport(self.reach, self._observed.agreed(), "it listens nowhere")
        return ReachReport(
            self.reach, self._observed.agreed(), self._explain() or "no other peer has tried to dial it yet"
        )

    def _found(self) -> ReachState:
        if self._fixed:
            where = Whereabouts.at(self._own)
        else:
            where = whereabouts(self._own, self._verdict, on_internet=self._on_internet)
        return ReachState(self.reach, self._wants_relays(where), where)

    def _wants_relays(self, where: Whereabouts) -> bool:
        """Whether we need relays: others cannot dial us, or no peer has tried although we asked."""
        if self._fixed:
            return False
        if not self._connections.listen_addresses:
            return True
        untried = self.reach is Reach.UNKNOWN and self._checks > 0
        return self.reach is Reach.PRIVATE or (untried and not where.contacts)

    def check_soon(self) -> None:
        """Check again soon, because our network may have changed."""
        self._unchanged = 0
        self._look_within(SETTLE_S)

    async def run(self) -> None:
        """Keep checking, so that `found` stays true, until cancelled. A peer that listens nowhere asks nobody."""
        async with trio.open_nursery() as nursery:

            def hear(connection: PeerConnection) -> None:
                contained = self._connections.containment.contained
                nursery.start_soon(partial(contained, self._hear, connection, what="hearing where a peer sees us"))

            with self._connections.watching(connected=hear, lost=self._forget):
                if self._fixed or not self._connections.listen_addresses:
                    await trio.sleep_forever()
                nursery.start_soon(watch_sleep, self._now, self._woke)
                if self._due == math.inf:
                    # A check failed, and this task was started again.
                    self._look_within(SETTLE_S)
                while True:
                    await self._wait_until_due()
                    await self._check()

    # When to check.

    def _look_within(self, seconds: float) -> None:
        soon = max(trio.current_time() + seconds, self._last_check + MIN_GAP_S)
        if soon < self._due:
            self._due = soon
            self._waiting.cancel()

    async def _wait_until_due(self) -> None:
        while trio.current_time() < self._due:
            with trio.CancelScope(deadline=self._due) as self._waiting:
                await trio.sleep_forever()

    async def _woke(self, _slept_s: float) -> None:
        log.info("this peer slept: checking again whether others can dial us")
        self.check_soon()

    def _forget(self, connection: PeerConnection) -> None:
        self._observed.forget(connection.peer_id)

    async def _hear(self, connection: PeerConnection) -> None:
        """Note where a peer sees us. Only peers that we dialled count: a stranger could dial us many times."""
        with suppress(ConnectionLost):
            hello = await connection.wait_hello()
            if connection.lost is not None or connection.punched:
                # Each of us has let the other in: that says nothing of peers that come without being asked.
                return
            if not connection.dialled:
                self._was_reached(connection, hello)
                return
            before = (self._on_internet, self._observed.agreed())
            self._observed.note(connection.peer_id, connection.remote_ip, hello.seen_at)
            self._on_internet |= public_network(connection.remote_ip) is not None
            after = (self._on_internet, self._observed.agreed())
            if after != before:
                self._moved(self._observed.agreed())

    def _was_reached(self, connection: PeerConnection, hello: Hello) -> None:
        """A peer outside our network dialled us. If it dialled one of our own addresses, that proves as much as a
        dial-back.
        """
        if self.reach is not Reach.UNKNOWN or public_network(connection.remote_ip) is None:
            return
        found = tuple(address for address in self._own if address.ip == hello.seen_at and not address.is_private)
        if found:
            self._conclude(Verdict(Reach.PUBLIC, found))

    def _moved(self, ips: tuple[IpAddress, ...]) -> None:
        """React to a new observed address, or to the first one after a time without any."""
        self._own = tuple(self._read_own())
        if not self._fixed and is_void(self._verdict, ips):
            self._conclude(Verdict())
        else:
            self._tell()
        self.check_soon()

    # The check itself.

    async def _check(self) -> None:
        self._last_check = trio.current_time()
        # News that arrives during the check is handled after it.
        self._due = math.inf
        self._own = tuple(self._read_own())
        trials = []
        ips = self._observed.agreed()
        if any(public_network(ip) for ip in ips):
            ips = tuple(ip for ip in ips if public_network(ip))
        for ip in ips:
            if ports := ports_for(ip, self._connections.listen_addresses):
                trials.append((ports, await self._ask(ip, ports)))
        if ips and not trials and all(address.is_loopback for address in self._connections.listen_addresses):
            verdict = Verdict(Reach.PRIVATE)
        else:
            verdict = judge(self._verdict, trials)
            if is_void(verdict, self._observed.agreed()):
                # Our address changed after we asked.
                verdict = Verdict()
        heard = any(answers for _, answers in trials)
        self._checks += 1
        self._unchanged = 0 if verdict.reach is not self.reach else self._unchanged + 1
        self._conclude(verdict)
        reach = self.reach if heard else Reach.UNKNOWN
        self._due = min(self._due, trio.current_time() + next_check_s(reach, self._unchanged, self._random))

    async def _ask(self, ip: IpAddress, ports: Sequence[int]) -> list[Dialled]:
        """The answers of two peers that see us at `ip`, or of three if the first two disagree."""
        answers: list[Dialled] = []
        askable = iter(self._judges(ip)[:MAX_ASKED])
        while peers := list(islice(askable, more_judges(answers))):
            results = await at_once([partial(self._ask_one, peer, ports) for peer in peers])
            answers += [answer for answer in results if answer is not None and answer.ip == ip]
        return answers

    async def _ask_one(self, peer: PeerConnection, ports: Sequence[int]) -> Dialled | None:
        try:
            return await ask_to_be_dialled(peer, ports)
        except PeerdError as error:
            log.debug("%s did not dial us: %s", peer.peer_id, error)
            return None

    def _judges(self, ip: IpAddress) -> list[PeerConnection]:
        """The peers to ask, in random order, with one peer from each network before the second of any."""
        judges = [
            connection
            for connection in self._connections.live.values()
            if connection.dialled
            # A NAT may let in whatever comes from an address to which our own port has sent something.
            and not self._connections.meetings.has_reached(connection.remote_ip)
            and connection.hello is not None
            and connection.hello.seen_at == ip
            and DIALBACK_PROTOCOL in connection.hello.protocols
        ]
        self._random.shuffle(judges)
        seen: dict[str, int] = {}
        rank = {}
        for peer in judges:
            network = (public_network(peer.remote_ip) if peer.remote_ip is not None else None) or str(peer.remote_ip)
            rank[peer.peer_id] = seen[network] = seen.get(network, 0) + 1
        return sorted(judges, key=lambda peer: rank[peer.peer_id])

    # What follows from the check.

    def _conclude(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self._tell()

    def _tell(self) -> None:
        """Publish the current result, and log once what an operator should know."""
        self.found.set(self._found())
        text = self._explain()
        if text and text != self._told:
            self._told = text
            quiet = all(address.is_loopback for address in self._verdict.proven)
            level = logging.WARNING if self.reach is Reach.PRIVATE else logging.DEBUG if quiet else logging.INFO
            log.log(level, "%s", text)

    def _explain(self) -> str:
        if self._fixed:
            return "announced as --announce says"
        return explain(self._verdict, may_be_relayed=self._connections.may_be_relayed)

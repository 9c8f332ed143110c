"""Finds out whether others can dial us, and keeps our announced addresses true (spec/reachability.md).

It decides when to ask which peers; `routing/reach/verdict.py` decides what their answers show. The answer changes: a
laptop sleeps, a router gets another address, a user forwards a port. So peers are asked again, at growing intervals,
and at once when the peers that we dialled see us at another address, when all connections were lost, or when the
machine has slept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from peerd.routing.reach.observed_ips import ObservedIps
from peerd.routing.reach.verdict import (
    Announced,
    Finding,
    Reach,
    announced,
    find,
    is_void,
    more_judges,
    next_check_s,
    ports_for,
)
from peerd.trio_tools import at_once

log = logging.getLogger(__name__)

# News comes in groups: the hellos of several peers that we have just dialled. So we wait this long for the rest.
SETTLE_S = 1.0
# The least time between two rounds of questions. A peer answers once a minute, but there are several.
MIN_GAP_S = 10.0
# How many peers are asked in one round about one address, those that refuse included.
MAX_ASKED = 6
# From here on Linux takes ports for programs that ask for any free one (net.ipv4.ip_local_port_range).
FIRST_CHOSEN_PORT = 32768


@dataclass(frozen=True, slots=True)
class Here:
    """Where we are, for status displays; `why` is a sentence for people."""

    reach: Reach
    observed: tuple[IpAddress, ...]
    why: str


class Reachability:
    """Whether others can dial us. `run` it; then read `reach` and `wants_relays`. `on_changed` is called when they
    change.

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
        self.on_changed: list[Callable[[], None]] = []
        self._connections = connections
        self._read_own = own
        self._own = tuple(own())
        self._fixed = fixed
        self._on_internet = any(address.ip is not None and not address.is_private for address in bootstrap)
        self._random = random
        self._now = now
        self._observed = ObservedIps()
        self._finding = Finding(Reach.PUBLIC) if fixed else Finding()
        self._announce: Callable[[Announced], None] = _nobody
        self._told = ""
        self._due = trio.current_time() + next_check_s(Reach.UNKNOWN, 0, random)
        self._last_check = -MIN_GAP_S
        self._checks = 0
        self._unchanged = 0
        self._waiting = trio.CancelScope()
        self._state = (self.reach, self.wants_relays)

    def __repr__(self) -> str:
        return f"<Reachability {self.reach.value} {self._observed!r}>"

    @property
    def reach(self) -> Reach:
        """Which peers can dial us, as far as we know."""
        return self._finding.reach

    @property
    def here(self) -> Here:
        """`reach`, our observed addresses, and the reason, for people."""
        if not self._connections.listen_addresses:
            return Here(self.reach, self._observed.agreed(), "it listens nowhere")
        return Here(self.reach, self._observed.agreed(), self._explain() or "nobody that it dialled has tried yet")

    @property
    def announced(self) -> Announced:
        """The addresses to announce now."""
        if self._fixed:
            return Announced(self._own, self._own)
        return announced(self._own, self._finding, on_internet=self._on_internet)

    @property
    def wants_relays(self) -> bool:
        """Whether we need relays: others cannot dial us, or no peer has tried although we asked."""
        if self._fixed:
            return False
        if not self._connections.listen_addresses:
            return True
        untried = self.reach is Reach.UNKNOWN and self._checks > 0
        return self.reach is Reach.PRIVATE or (untried and not self.announced.contacts)

    def changed(self) -> None:
        """Check again soon, because our network may have changed."""
        self._unchanged = 0
        self._look_within(SETTLE_S)

    async def run(self, announce: Callable[[Announced], None]) -> None:
        """Keep checking, and call `announce` with each new result, until cancelled. A peer that listens nowhere asks
        nobody.
        """
        self._announce = announce
        async with trio.open_nursery() as nursery:
            with self._hearing(nursery):
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
        log.info("this peer slept: looking again who can dial us")
        self.changed()

    @contextmanager
    def _hearing(self, nursery: trio.Nursery) -> Iterator[None]:
        def connected(connection: PeerConnection) -> None:
            contained = self._connections.containment.contained
            nursery.start_soon(partial(contained, self._hear, connection, what="hearing where a peer sees us"))

        def lost(connection: PeerConnection) -> None:
            self._observed.forget(connection.peer_id)

        for connection in self._connections.live.values():
            connected(connection)
        self._connections.on_connected.append(connected)
        self._connections.on_lost.append(lost)
        try:
            yield
        finally:
            self._connections.on_connected.remove(connected)
            self._connections.on_lost.remove(lost)

    async def _hear(self, connection: PeerConnection) -> None:
        """Note where a peer sees us. Only peers that we dialled count: a stranger could dial us many times."""
        with suppress(ConnectionLost):
            hello = await connection.wait_hello()
            if connection.lost is not None:
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
            self._conclude(Finding(Reach.PUBLIC, found))

    def _moved(self, ips: tuple[IpAddress, ...]) -> None:
        """React to a new observed address, or to the first one after a time without any."""
        self._own = tuple(self._read_own())
        if not self._fixed and is_void(self._finding, ips):
            self._conclude(Finding())
        else:
            self._tell()
        self.changed()

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
            found = Finding(Reach.PRIVATE)
        else:
            found = find(self._finding, trials)
            if is_void(found, self._observed.agreed()):
                # Our address changed after we asked.
                found = Finding()
        heard = any(answers for _, answers in trials)
        self._checks += 1
        self._unchanged = 0 if found.reach is not self.reach else self._unchanged + 1
        self._conclude(found)
        reach = self.reach if heard else Reach.UNKNOWN
        self._due = min(self._due, trio.current_time() + next_check_s(reach, self._unchanged, self._random))

    async def _ask(self, ip: IpAddress, ports: Sequence[int]) -> list[Dialled]:
        """The answers of two peers that see us at `ip`, or of three if the first two disagree."""
        answers: list[Dialled] = []
        judges = iter(self._judges(ip)[:MAX_ASKED])
        while asked := list(islice(judges, more_judges(answers))):
            said = await at_once([partial(self._ask_one, judge, ports) for judge in asked])
            answers += [answer for answer in said if answer is not None and answer.ip == ip]
        return answers

    async def _ask_one(self, judge: PeerConnection, ports: Sequence[int]) -> Dialled | None:
        try:
            return await ask_to_be_dialled(judge, ports)
        except PeerdError as error:
            log.debug("%s did not dial us: %s", judge.peer_id, error)
            return None

    def _judges(self, ip: IpAddress) -> list[PeerConnection]:
        """The peers to ask, in random order, with one peer from each network before the second of any."""
        judges = [
            connection
            for connection in self._connections.live.values()
            if connection.dialled
            and connection.hello is not None
            and connection.hello.seen_at == ip
            and DIALBACK_PROTOCOL in connection.hello.protocols
        ]
        self._random.shuffle(judges)
        seen: dict[str, int] = {}
        rank = {}
        for judge in judges:
            network = (public_network(judge.remote_ip) if judge.remote_ip is not None else None) or str(judge.remote_ip)
            rank[judge.peer_id] = seen[network] = seen.get(network, 0) + 1
        return sorted(judges, key=lambda judge: rank[judge.peer_id])

    # What follows from the check.

    def _conclude(self, found: Finding) -> None:
        self._finding = found
        self._tell()

    def _tell(self) -> None:
        """Announce the current result, call the observers of changes, and log once what an operator should know."""
        self._announce(self.announced)
        state = (self.reach, self.wants_relays)
        if state != self._state:
            self._state = state
            for observer in tuple(self.on_changed):
                observer()
        said = self._explain()
        if said and said != self._told:
            self._told = said
            quiet = all(address.is_loopback for address in self._finding.proven)
            level = logging.WARNING if self.reach is Reach.PRIVATE else logging.DEBUG if quiet else logging.INFO
            log.log(level, "%s", said)

    def _explain(self) -> str:
        finding = self._finding
        if self._fixed:
            return "announced as --announce says"
        if finding.reach is Reach.PUBLIC:
            return f"others can dial us at {', '.join(map(str, finding.proven))}"
        if finding.reach is Reach.UNKNOWN:
            return ""
        if not finding.failed:
            return "nobody can dial us: we listen on loopback only; say --listen /ip4/0.0.0.0/tcp/PORT/ws"
        tried = ", ".join(f"{address} ({outcome.replace('_', ' ')})" for address, outcome in finding.failed)
        ports = " and ".join(dict.fromkeys(str(address.port) for address, _ in finding.failed))
        # The system chose this port, and will choose another one at the next start.
        chosen = [address for address, _ in finding.failed if address.port >= FIRST_CHOSEN_PORT]
        keep = f" (and keep it with --listen /ip4/0.0.0.0/tcp/{chosen[0].port}/ws)" if chosen else ""
        return (
            f"nobody can dial us at {tried}: forward TCP port {ports} on the router or open it in the firewall{keep},"
            f" or say with --announce what reaches this machine; {self._other_way}"
        )

    @property
    def _other_way(self) -> str:
        if self._connections.may_be_relayed:
            return "until then we can be reached through relays only"
        return "until then we cannot be reached at all, for we may not be relayed"


def _nobody(_announced: Announced) -> None:
    pass

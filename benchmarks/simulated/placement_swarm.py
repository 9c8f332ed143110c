"""A whole swarm of servers that choose and change their blocks, in simulated time and without computing.

The servers decide with a daemon's own code: `choose_first`, `Rebalancer`, `Slots` and the planner below them. The world
is simulated (`placement_world`): announcements that others see a second or two later, speeds, memories, downloads,
loads, sessions of various lengths, and crashes that other servers do not see for a while. The simulation also has the
true state, which the servers only believe to know, so it notices at once when a move takes a block's last server away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import trio

from benchmarks.simulated.placement_world import MODEL, Board, World, fake_record, fake_span
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.routing.directory.announcer import MIN_PERIOD_S, TTL_S
from peerd.routing.placement.flow import swarm_flow
from peerd.server.served_spans import ServedSpan
from peerd.spans.first_choice import Choice, choose_first
from peerd.spans.loading import LoadedSpan
from peerd.spans.mover import Rebalancer
from peerd.spans.slots import Slots


class Server:
    """One server: what `Rebalancer` and `choose_first` need of a daemon, and the world in which they act."""

    draining = paused = False
    sessions = 1

    def __init__(self, swarm: Swarm, number: int) -> None:
        self._swarm = swarm
        self._random = Random(f"{swarm.seed} {number}")
        self.peer_id = Identity.from_seed(number.to_bytes(32, "big")).peer_id
        world = swarm.world
        self.size = max(1, min(world.blocks, round(world.size * self._random.lognormvariate(0, world.spread))))
        self.throughput = self._random.lognormvariate(6, world.spread)
        self.slots = Slots(self, lambda: None)  # type: ignore[arg-type]
        #: What it really holds, and whether it accepts no more sessions.
        self.held: Span | None = None
        self.leaving = False
        self.struck = False
        self.scope = trio.CancelScope()
        self._disk: set[int] = set()
        self._announced = trio.Event()
        self._changes = trio.Event()

    # The interface that a daemon's parts use.

    @property
    def directory(self) -> Board:
        return self._swarm.board

    def announce_soon(self) -> None:
        self._changes.set()

    async def wait_announced(self) -> None:
        await self._announced.wait()

    async def reaches(self, peer_id: PeerId) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    def is_absent(self, peer_id: PeerId) -> bool:
        return False

    def is_reached(self, peer_id: PeerId) -> bool:
        return True

    def lent_tokens(self, served: ServedSpan) -> int:
        return 0

    def is_leaving(self, served: ServedSpan) -> bool:
        return self.leaving

    def serve(self, served: ServedSpan) -> None:
        self.held, self.leaving = served.span, False
        self._swarm.note()

    def refuse(self, served: ServedSpan) -> None:
        self.leaving = True

    def resume(self, served: ServedSpan) -> None:
        self.leaving = False

    async def wait_unused(self, served: ServedSpan, timeout_s: float) -> None:
        await trio.sleep(min(timeout_s, self._random.expovariate(1 / self._swarm.world.session_s)))

    async def withdraw(self, served: ServedSpan) -> None:
        await trio.lowlevel.checkpoint()
        self._swarm.check_stays_covered(self, served.span)
        self.held = None
        self._swarm.note()

    async def on_disk(self) -> frozenset[int]:
        return frozenset(self._disk)

    async def fetch(self, span: Span) -> None:
        wanted = set(range(span.start, span.end)) - self._disk
        await trio.sleep(len(wanted) * self._swarm.world.fetch_s)
        self._disk |= wanted

    async def load(self, span: Span) -> tuple[ServedSpan, LoadedSpan]:
        await trio.sleep(len(span) * self._swarm.world.load_s)
        self._swarm.loads += 1
        return fake_span(span, self.throughput)

    async def free(self) -> None:
        await trio.lowlevel.checkpoint()

    # Its life.

    async def run(self) -> None:
        """Start, serve and move until cancelled."""
        world = self._swarm.world
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce)
            slot = self.slots.reserve(fake_record(self.size))
            choice = Choice(MODEL, world.blocks, self.size, frozenset(self._disk))
            span = await choose_first(choice, slot, self, self.peer_id, self._random)
            slot.decide(span)
            self.announce_soon()
            await self.fetch(span)
            self.slots.add(slot, *await self.load(span))
            self.announce_soon()
            rebalancer = Rebalancer(slot, self, self, self, self.peer_id, world.blocks, self._random)
            self._swarm.rebalancers.append(rebalancer)
            await rebalancer.run()

    def end(self, *, crashed: bool) -> None:
        """Remove the server from the swarm."""
        self.held = None
        self.directory.post(self.peer_id, [], refreshed=not crashed)
        self._swarm.note()

    async def _announce(self) -> None:
        """Announce as `Announcer` does, but without the renewals, which change nothing that others see."""
        while True:
            await self._changes.wait()
            self._changes = trio.Event()
            announced, self._announced = self._announced, trio.Event()
            seen = self.directory.post(self.peer_id, self.slots.records())
            started = trio.current_time()
            await trio.sleep(seen - started)
            announced.set()
            await trio.sleep_until(started + MIN_PERIOD_S)


@dataclass(slots=True)
class Sample:
    """The swarm at one instant. What it carries as a share of the most that its present servers could carry in any
    placement, and of the most that all servers could; how many blocks have no server; and how many moves there were so
    far.
    """

    time_s: float
    of_serving: float
    of_present: float
    gaps: int
    moves: int


class Swarm:
    """All servers, and the results."""

    def __init__(self, world: World, seed: int = 1) -> None:
        self.world = world
        self.seed = seed
        self.board = Board(Random(f"{seed} board"))
        self.rebalancers: list[Rebalancer] = []
        self.samples: list[Sample] = []
        self.loads = 0
        self.covered_s: float | None = None
        #: Moves that took away a block's last server: because another had crashed and this was not visible yet, and for
        #: other reasons.
        self.unlucky = self.careless = 0
        self._random = Random(f"{seed} churn")
        self.servers: dict[int, Server] = {}
        self._ghosts: list[tuple[float, Span]] = []
        self._next = 0

    @property
    def moves(self) -> int:
        return sum(rebalancer.moves for rebalancer in self.rebalancers)

    async def run(self, hours: float, *, sample_s: float = 60.0) -> None:
        """Run the swarm."""
        async with trio.open_nursery() as nursery:
            for _ in range(self.world.servers):
                nursery.start_soon(self._live, self._random.uniform(0, self.world.join_s))
            nursery.start_soon(self._strike)
            while trio.current_time() < hours * 3600:
                await trio.sleep(sample_s)
                self.samples.append(self._sample())
            nursery.cancel_scope.cancel()

    async def _live(self, start_s: float) -> None:
        """Run one server after another: within two minutes a new one replaces a server that leaves."""
        await trio.sleep(start_s)
        churn = self.world.churn_an_hour
        while True:
            number, self._next = self._next, self._next + 1
            server = self.servers[number] = Server(self, number)
            server.scope.deadline = trio.current_time() + (
                self._random.expovariate(churn / 3600) if churn else math.inf
            )
            with server.scope:
                await server.run()
            del self.servers[number]
            crashed = server.struck or self._random.random() < 0.5
            if crashed:
                self.crashed(server)
            server.end(crashed=crashed)
            if server.struck:
                return
            await trio.sleep(self._random.uniform(0, 120))

    def crashed(self, server: Server) -> None:
        """Note what a crashed server held, which others see until its announcements expire."""
        if server.held is not None:
            self._ghosts.append((trio.current_time() + TTL_S, server.held))

    async def _strike(self) -> None:
        await trio.sleep(self.world.strike_s)
        for server in self.servers.values():
            if server.held and server.held.start < self.world.blocks // 4:
                server.struck = True
                server.scope.cancel()

    def check_stays_covered(self, goes: Server, span: Span) -> None:
        """Count a move that leaves a block without servers."""
        stay = [one.held for one in self.servers.values() if one is not goes and one.held and not one.leaving]
        if _covers(stay, span):
            return
        ghosts = [ghost for until, ghost in self._ghosts if until > trio.current_time()]
        if _covers([*stay, *ghosts], span):
            self.unlucky += 1
        else:
            self.careless += 1

    def note(self) -> None:
        """Note that a server has begun or ended to serve."""
        if self.covered_s is None and _covers(self._held(), Span(0, self.world.blocks)):
            self.covered_s = trio.current_time()

    def _held(self) -> list[Span]:
        return [one.held for one in self.servers.values() if one.held]

    def _sample(self) -> Sample:
        blocks = self.world.blocks
        serving = [(one.held, one.throughput) for one in self.servers.values() if one.held]
        flow = swarm_flow(serving, blocks)
        present = [(one.size, one.throughput) for one in self.servers.values()]
        gaps = sum(not _covers([span for span, _ in serving], Span(block, block + 1)) for block in range(blocks))
        return Sample(
            trio.current_time(),
            flow / (most_flow([(len(span), rate) for span, rate in serving], blocks) or math.inf),
            flow / (most_flow(present, blocks) or math.inf),
            gaps,
            self.moves,
        )


def most_flow(servers: list[tuple[int, float]], block_count: int) -> float:
    """The most that servers with so many blocks and so much throughput could carry, in any placement.

    It is an upper bound: each server gives all of its time wherever it is needed, but no block more than the flow.
    """
    # Find the flow f with sum(min(throughput, size * f)) = block_count * f. A server that is fast for its size has time
    # to spare. What the others can give falls as f rises.
    low, high = 0.0, sum(rate for _, rate in servers) / block_count
    if sum(size for size, _ in servers) < block_count:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = sum(min(rate, size * middle) for size, rate in servers) >= block_count * middle
        low, high = (middle, high) if enough else (low, middle)
    return low


def _covers(spans: list[Span], wanted: Span) -> bool:
    at = wanted.start
    for span in sorted(spans, key=lambda span: span.start):
        if span.start > at:
            return False
        at = max(at, span.end)
        if at >= wanted.end:
            return True
    return False

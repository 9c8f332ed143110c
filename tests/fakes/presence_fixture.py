"""A swarm with a DHT in a network in memory, whose peers come, leave, crash, restart and sleep at a test's command."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import trio

from peerd.client.finding.finder import Patience, SwarmFinder
from peerd.client.finding.scout import Scout
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.opener import ChainOpener, Terms
from peerd.client.session.session import Session
from peerd.discovery.discovery import Discovery, open_discovery
from peerd.discovery.prober import RttProber
from peerd.net.connections import Connections, open_connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import NoChain
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.records.envelope import ServerRecord
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span
from peerd.routing.clock import SwarmClock
from peerd.routing.reach.verdict import Whereabouts
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import AdapterRoom
from peerd.server.served_spans import ServedSpan
from peerd.server.server import Server
from peerd.spans.loading import LoadedSpan
from peerd.spans.slots import Slots
from peerd.testing.fake_engine import FakeEngine
from peerd.testing.network import MemoryNetwork
from peerd.trio_tools import Watched, open_tasks

EPOCH = 1_800_000_000.0
MODEL = bytes(range(32))
BLOCKS = 4
ALL = Span(0, BLOCKS)
WIDTH = 8
MAX_LENGTH = 1024
LATENCY_S = 0.01
# The announcement of a slot whose span has not been loaded yet.
EXPECTED = ServerRecord(
    seq=0,
    expires=0.0,
    model=MODEL,
    span=ALL,
    state="joining",
    dtype="float32",
    quantization="none",
    codecs=("exact",),
    throughput=0.0,
    free_tokens=0,
    max_length=MAX_LENGTH,
)
BOOTSTRAP = 1


def identity_of(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32, "big"))


@dataclass(eq=False)
class Serving:
    """A serving peer."""

    number: int
    server: Server
    connections: Connections
    discovery: Discovery
    scope: trio.CancelScope
    ended: trio.Event

    @property
    def peer_id(self) -> PeerId:
        return identity_of(self.number).peer_id


@dataclass(eq=False)
class Client:
    """A client, with a model of its own."""

    number: int
    connections: Connections
    discovery: Discovery
    finder: SwarmFinder
    opener: ChainOpener
    tasks: trio.Nursery

    async def chosen(self) -> PeerId | None:
        """The peers that a new session would use for all blocks; None if there is no chain."""
        try:
            chain = await self.finder.find(ALL, tokens=64, exclude=())
        except NoChain:
            return None
        return chain.hops[0].peer_id

    async def session(self, patience: Patience | None = None) -> Session:
        terms = Terms(
            model=MODEL,
            size=SessionSize(256, max_rollback=256),
            max_steps=4,
            dtype="float32",
            codec="exact",
            timeout_ms=2000,
        )
        rng = Random(self.number)
        spec = SessionSpec(ALL, WIDTH, terms, patience or Patience())
        session = Session(SessionTools(self.finder, self.opener, rng), spec)
        await self.tasks.start(session.run)
        return session


class World:
    """Peer 1 is the bootstrap peer for all, and serves nothing."""

    def __init__(self, tasks: trio.Nursery) -> None:
        self.network = MemoryNetwork(latency_s=LATENCY_S)
        # What wall clocks show beyond the time that our loop's clock has counted: machines slept meanwhile.
        self.slept_s = 0.0
        self._numbers = {BOOTSTRAP}
        self._tasks = tasks
        self._bootstrap = (self.address(BOOTSTRAP).with_peer(identity_of(BOOTSTRAP).peer_id),)

    def now(self) -> float:
        return EPOCH + trio.current_time() + self.slept_s

    @staticmethod
    def host(number: int) -> str:
        return f"10.0.0.{number}"

    def address(self, number: int) -> Multiaddr:
        return Multiaddr.parse(f"/ip4/{self.host(number)}/tcp/4000/ws")

    # Coming.

    async def serve(self, number: int, span: Span | None = ALL) -> Serving:
        """Start a server of blocks, and wait until it is announced; with None a peer that only keeps the DHT."""
        self._numbers.add(number)
        server: Serving = await self._tasks.start(self._run_server, number, span)
        return server

    async def client(self, number: int) -> Client:
        self._numbers.add(number)
        client: Client = await self._tasks.start(self._run_client, number)
        return client

    @asynccontextmanager
    async def _peer(
        self, number: int, listen: tuple[Multiaddr, ...], handlers: Any
    ) -> AsyncIterator[tuple[Connections, Discovery]]:
        who = identity_of(number)
        transport = self.network.transport(self.host(number))
        async with (
            open_connections(who, transport=transport, listen=listen, handlers=handlers, now=self.now) as connections,
            open_discovery(
                connections,
                who,
                () if number == BOOTSTRAP else self._bootstrap,
                state_dir=None,
                random=Random(number),
                clock=SwarmClock(self.now),
                where=Watched(Whereabouts.at(listen)),
            ) as discovery,
        ):
            yield connections, discovery

    async def _run_server(self, number: int, span: Span | None, task_status: trio.TaskStatus[Serving]) -> None:
        server = Server(self.now)
        ended = trio.Event()
        with trio.CancelScope() as scope:
            async with open_tasks() as tasks, AsyncExitStack() as stack:
                await tasks.start(server.run)
                peer = self._peer(number, (self.address(number),), server.handlers)
                connections, discovery = await stack.enter_async_context(peer)
                server.attach(connections)
                if span is not None:
                    slots = Slots(server, discovery.announce_soon)
                    slots.add(slots.reserve(EXPECTED), *_fake_span(span))
                    discovery.announce_from(slots.records)
                    await discovery.wait_announced()
                task_status.started(Serving(number, server, connections, discovery, scope, ended))
                await trio.sleep_forever()
        ended.set()

    async def _run_client(self, number: int, task_status: trio.TaskStatus[Client]) -> None:
        async with self._peer(number, (), {}) as (connections, discovery), open_tasks() as tasks:
            rng = Random(number)
            track_record, directory = discovery.track_record, discovery.directory
            finder = SwarmFinder(directory, track_record, MODEL, BLOCKS, rng)
            opener = ChainOpener(connections, identity_of(number), directory, discovery.clock, rng.randbytes)
            prober = RttProber(connections, track_record, discovery.may_dial)
            tasks.start_soon(Scout(finder, prober, ALL, Random(number)).run)
            task_status.started(Client(number, connections, discovery, finder, opener, tasks))
            await trio.sleep_forever()

    # Going.

    async def stop(self, server: Serving) -> None:
        """The peer leaves in good order."""
        server.scope.cancel()
        await server.ended.wait()

    async def crash(self, server: Serving) -> None:
        """The process dies without a message; its system resets open connections, and refuses new ones."""
        self.network.kill(self.host(server.number))
        self.cut_off(server.number)
        server.scope.cancel()
        await server.ended.wait()
        self.join_up(server.number)

    def cut_off(self, number: int) -> None:
        """Nothing from or to this host arrives."""
        for other in self._numbers - {number}:
            self.network.partition(self.host(number), self.host(other))

    def join_up(self, number: int) -> None:
        """End a cut: messages arrive again."""
        for other in self._numbers - {number}:
            self.network.heal(self.host(number), self.host(other))


def _fake_span(span: Span) -> tuple[ServedSpan, LoadedSpan]:
    async def run_batch(run: Callable[[Any], Any], batch: Any) -> Any:
        await trio.sleep(0.01)
        return run(batch)

    engine: Any = FakeEngine(span, hidden_size=WIDTH, kv_tokens=4096)
    family: Any = None
    served = ServedSpan(MODEL, MAX_LENGTH, EngineTask(engine, run_batch=run_batch))
    return served, LoadedSpan(engine, "float32", "none", ("exact",), 1000.0, (), AdapterRoom(), family)


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    """A bootstrap peer, and the peers that the test adds."""
    async with open_tasks() as tasks:
        world = World(tasks)
        await world.serve(BOOTSTRAP, None)
        yield world
        tasks.cancel_scope.cancel()


async def seconds_until(condition: Callable[[], Any], within_s: float = 120.0, every_s: float = 0.1) -> float:
    """How many seconds pass until the awaited condition holds."""
    start = trio.current_time()
    while trio.current_time() - start <= within_s:
        if await condition():
            return trio.current_time() - start
        await trio.sleep(every_s)
    raise AssertionError(f"it did not come to that within {within_s} s")

"""Servers that may move: a whole swarm in memory, with its DHT, on a clock that jumps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
import trio

from peerd.client.finding.finder import Patience, SwarmFinder
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.opener import ChainOpener, Terms
from peerd.client.session.session import Session
from peerd.discovery.discovery import Discovery, open_discovery
from peerd.net.connections import open_connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity
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
from peerd.spans.mover import LOOK_S, LOOK_SPREAD, MAX_DRAIN_S, MoveTiming, Rebalancer
from peerd.spans.slots import Slot, Slots
from peerd.testing.fake_engine import FakeEngine
from peerd.testing.network import MemoryNetwork
from peerd.trio_tools import Watched, open_tasks

EPOCH = 1_800_000_000.0

MODEL = bytes(range(32))

BLOCKS = 8

WIDTH = 8

MAX_LENGTH = 1024

EXPECTED = ServerRecord(
    seq=0,
    expires=0.0,
    model=MODEL,
    span=Span(0, 1),
    state="joining",
    dtype="float32",
    quantization="none",
    codecs=("exact",),
    throughput=0.0,
    free_tokens=0,
    max_length=MAX_LENGTH,
)

# Servers look three times as often as they usually do, for a third of the time is to be simulated.
TIMING = MoveTiming(look_s=LOOK_S / 3)
ROUND_S = TIMING.look_s * (1 + LOOK_SPREAD) + TIMING.hesitation_s + 10


def unix_now() -> float:
    return EPOCH + trio.current_time()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 251, (count, WIDTH), generator=torch.Generator().manual_seed(1)).float()


@dataclass
class FakeLoader:
    """Loads a fake engine in `load_s`, unless `failing` holds a reason for the span."""

    load_s: float = 20.0
    fetch_s: float = 5.0
    failing: dict[Span, Exception] = field(default_factory=dict)
    unfetchable: dict[Span, Exception] = field(default_factory=dict)
    disk: frozenset[int] = frozenset(range(BLOCKS))
    loading: Span | None = None
    loads: list[Span] = field(default_factory=list)
    #: Called when a load begins.
    watch: Callable[[], None] = lambda: None

    async def on_disk(self) -> frozenset[int]:
        await trio.lowlevel.checkpoint()
        return self.disk

    async def fetch(self, span: Span) -> None:
        await trio.sleep(self.fetch_s)
        if span in self.unfetchable:
            raise self.unfetchable[span]

    async def load(self, span: Span) -> tuple[ServedSpan, LoadedSpan]:
        self.watch()
        self.loads.append(span)
        self.loading = span
        try:
            await trio.sleep(self.load_s)
        finally:
            self.loading = None
        if span in self.failing:
            raise self.failing[span]
        return fake_span(span)

    async def free(self) -> None:
        await trio.lowlevel.checkpoint()


def fake_span(span: Span, throughput: float = 1000.0) -> tuple[ServedSpan, LoadedSpan]:
    async def run_batch(run: Callable[[Any], Any], batch: Any) -> Any:
        await trio.sleep(0.01)
        return run(batch)

    engine: Any = FakeEngine(span, hidden_size=WIDTH, kv_tokens=4096)
    family: Any = None
    served = ServedSpan(MODEL, MAX_LENGTH, EngineTask(engine, run_batch=run_batch))
    return served, LoadedSpan(engine, "float32", "none", ("exact",), throughput, (), AdapterRoom(), family)


@dataclass(eq=False)
class Peer:
    identity: Identity
    server: Server
    slots: Slots
    discovery: Discovery
    loader: FakeLoader
    scope: trio.CancelScope
    tasks: trio.Nursery
    rebalancer: Rebalancer | None = None

    def start_moving(self, seed: int) -> None:
        self.rebalancer = Rebalancer(
            self.slot, self.loader, self.server, self.discovery, self.identity.peer_id, BLOCKS, Random(seed), TIMING
        )
        self.tasks.start_soon(self.rebalancer.run)

    @property
    def slot(self) -> Slot:
        return next(iter(self.slots))

    @property
    def spans(self) -> list[str]:
        return [str(served.span) for served in self.server.spans]

    def states(self) -> dict[str, str]:
        return {str(record.span): record.state for record in self.slots.records()}


class Swarm:
    """Peers with a DHT, the first of them a bootstrap peer that serves nothing."""

    def __init__(self, tasks: trio.Nursery) -> None:
        self.network = MemoryNetwork(latency_s=0.01)
        self.bootstrap: tuple[Multiaddr, ...] = ()
        self.peers: list[Peer] = []
        self._tasks = tasks
        self._next = 1

    async def serve(self, span: str | None, *, moves: bool = False) -> Peer:
        peer: Peer = await self._tasks.start(self._run, span, moves)
        self.peers.append(peer)
        return peer

    async def _run(self, span: str | None, moves: bool, task_status: trio.TaskStatus[Peer]) -> None:
        number, self._next = self._next, self._next + 1
        identity = Identity.from_seed(number.to_bytes(32, "big"))
        address = Multiaddr.parse(f"/ip4/10.0.0.{number}/tcp/4000/ws")
        server, loader = Server(unix_now), FakeLoader()
        with trio.CancelScope() as scope:
            async with open_tasks() as tasks:
                await tasks.start(server.run)
                async with (
                    open_connections(
                        identity,
                        transport=self.network.transport(f"10.0.0.{number}"),
                        listen=[address],
                        handlers=server.handlers,
                        now=unix_now,
                    ) as connections,
                    open_discovery(
                        connections,
                        identity,
                        self.bootstrap,
                        state_dir=None,
                        random=Random(number),
                        clock=SwarmClock(unix_now),
                        where=Watched(Whereabouts.at([address])),
                    ) as discovery,
                    open_tasks() as moving,
                ):
                    self.bootstrap = self.bootstrap or (address.with_peer(identity.peer_id),)
                    server.attach(connections)
                    slots = Slots(server, discovery.announce_soon)
                    peer = Peer(identity, server, slots, discovery, loader, scope, moving)
                    if span is not None:
                        peer.slots.add(peer.slots.reserve(EXPECTED), *fake_span(Span.parse(span)))
                        discovery.announce_from(peer.slots.records)
                        await discovery.wait_announced()
                    if moves:
                        peer.start_moving(number)
                    task_status.started(peer)
                    await trio.sleep_forever()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A client's session over all blocks."""
        number, self._next = self._next, self._next + 1
        identity = Identity.from_seed(number.to_bytes(32, "big"))
        async with (
            open_connections(
                identity, transport=self.network.transport(f"10.0.0.{number}"), handlers={}, now=unix_now
            ) as connections,
            open_discovery(
                connections,
                identity,
                self.bootstrap,
                state_dir=None,
                random=Random(number),
                clock=SwarmClock(unix_now),
            ) as discovery,
            open_tasks() as tasks,
        ):
            rng = Random(number)
            directory, track_record = discovery.directory, discovery.track_record
            finder = SwarmFinder(directory, track_record, MODEL, BLOCKS, rng)
            opener = ChainOpener(connections, identity, directory, unix_now, rng.randbytes)
            terms = Terms(
                model=MODEL,
                size=SessionSize(512, max_rollback=512),
                max_steps=4,
                dtype="float32",
                codec="exact",
                timeout_ms=2000,
                adapter="",
                own_adapter=None,
            )
            session = Session(SessionTools(finder, opener, rng), SessionSpec(Span(0, BLOCKS), WIDTH, terms, Patience()))
            await tasks.start(session.run)
            yield session

    async def watch_coverage(self, blocks: range) -> None:
        """Fail as soon as one of these has no server that takes sessions."""
        while True:
            held = {
                block
                for peer in self.peers
                for served in peer.server.spans
                if not peer.server.is_leaving(served)
                for block in range(served.span.start, served.span.end)
            }
            assert held.issuperset(blocks)
            await trio.sleep(0.5)


@asynccontextmanager
async def open_swarm(*spans: str) -> AsyncIterator[Swarm]:
    async with open_tasks() as tasks:
        swarm = Swarm(tasks)
        await swarm.serve(None)
        for span in spans:
            await swarm.serve(span)
        yield swarm
        tasks.cancel_scope.cancel()


async def until(condition: Callable[[], bool], within_s: float = 2 * ROUND_S + MAX_DRAIN_S) -> None:
    with trio.fail_after(within_s):
        for _ in range(round(within_s * 4) + 1):
            if condition():
                return
            await trio.sleep(0.25)
    raise AssertionError("it never came to that")

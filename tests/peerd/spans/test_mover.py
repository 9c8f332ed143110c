"""Servers that move: in a whole swarm in memory, with its DHT, on a clock that jumps."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import trio

import peerd
from peerd.client.finding.finder import Patience, SwarmFinder
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.opener import ChainOpener, Terms
from peerd.client.session.session import Session
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, DiskFullError
from peerd.discovery.discovery import Discovery, open_discovery
from peerd.net.connections import open_connections
from peerd.net.containment import Containment
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import ServerRecord
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span
from peerd.routing.clock import SwarmClock
from peerd.routing.dht.record_sets import PartialView
from peerd.routing.reach.verdict import Whereabouts
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import AdapterRoom
from peerd.server.served_spans import ServedSpan
from peerd.server.server import Server
from peerd.spans import loading as span_loader
from peerd.spans.loading import LoadedSpan
from peerd.spans.mover import LOOK_S, LOOK_SPREAD, MAX_DRAIN_S, MAX_HESITATION_S, Rebalancer
from peerd.spans.slots import Slot, Slots
from peerd.spans.swap import LOAD_ERRORS, STEADY_S, Reloader, SpanSwap
from peerd.testing.fake_engine import FakeEngine, fake_forward
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
ROUND_S = LOOK_S * (1 + LOOK_SPREAD) + MAX_HESITATION_S + 10


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
            self.slot, self.loader, self.server, self.discovery, self.identity.peer_id, BLOCKS, Random(seed)
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


async def test_a_spare_server_closes_a_gap() -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        await until(lambda: spare.spans == ["4:8"])
        assert spare.states() == {"4:8": "online"}
        async with swarm.session() as session:
            row = tokens(6)
            assert torch.equal(await session.step(row, want="all"), fake_forward(row, Span(0, 8)))


async def test_the_old_engine_is_gone_before_the_new_one_is_loaded() -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        assert spare.slot.served is not None
        engine = weakref.ref(spare.slot.served.task.engine)
        seen = []
        spare.loader.watch = lambda: seen.append(engine() is None)
        await until(lambda: spare.spans == ["4:8"])
        assert seen == [True]


async def test_others_hear_of_a_move_before_it_begins_and_while_it_lasts() -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        seen: list[dict[str, str]] = []
        other = swarm.peers[1].discovery.directory
        with trio.move_on_after(ROUND_S + 60):
            while True:
                offers = await other.servers(MODEL, BLOCKS, max_age_s=0.0)
                states = {
                    str(offer.span): offer.record.state for offer in offers if offer.peer_id == spare.identity.peer_id
                }
                if not seen or seen[-1] != states:
                    seen.append(states)
                await trio.sleep(0.5)
        assert {"0:4": "online", "4:8": "joining"} in seen
        assert {"4:8": "joining"} in seen
        assert seen[-1] == {"4:8": "online"}
        assert {} not in seen


async def test_a_running_session_ends_before_its_server_goes() -> None:
    async with open_swarm("4:8") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        async with swarm.session() as session:
            row = tokens(20)
            expected = fake_forward(row, Span(0, 8))
            assert torch.equal(await session.step(row[:10], want="all"), expected[:10])
            for _ in range(2):
                await swarm.serve("0:4")
            position = 10
            while spare.states().get("0:4") != "draining":
                # Idle for five minutes it would be evicted.
                await trio.sleep(200)
                assert torch.equal(await session.step(row[position : position + 1]), expected[position : position + 1])
                position += 1
            assert torch.equal(await session.step(row[position:], want="all"), expected[position:])
            assert session.failovers == 0
            assert spare.server.sessions == 1
        # Its client has left.
        await until(lambda: spare.spans == ["4:8"], 60)


async def test_a_session_that_does_not_end_finds_another_server_and_loses_no_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_swarm("4:8") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        async with swarm.session() as session:
            row = tokens(30)
            expected = fake_forward(row, Span(0, 8))
            assert torch.equal(await session.step(row[:10], want="all"), expected[:10])
            # Now it is spare: another takes its place, and half of the servers of the other end.
            await swarm.serve("0:4")
            await swarm.serve("0:4")
            position = 10
            while spare.spans != ["4:8"]:
                await trio.sleep(60)
                if position < 29:
                    position += 1
                    assert torch.equal(
                        await session.step(row[position - 1 : position]), expected[position - 1 : position]
                    )
                assert trio.current_time() < 4 * ROUND_S + MAX_DRAIN_S
            assert "still in memory" not in caplog.text
            assert torch.equal(await session.step(row[position:], want="all"), expected[position:])
            assert session.failovers == 1


@pytest.mark.parametrize("seed", range(1, 3))
async def test_two_spare_servers_do_not_both_move_into_one_gap(seed: int) -> None:
    async with open_swarm("0:4") as swarm:
        # The same seed: both look at the same time, and hesitate as long, every time.
        spares = [await swarm.serve("0:4") for _ in range(2)]
        for spare in spares:
            spare.start_moving(seed)
        await trio.sleep(2 * ROUND_S)
        assert sum(spare.loader.loads.count(Span(4, 8)) for spare in spares) <= 1


async def test_of_several_spare_servers_one_closes_the_gap() -> None:
    async with open_swarm("0:4") as swarm:
        spares = [await swarm.serve("0:4", moves=True) for _ in range(2)]
        await trio.sleep(2 * ROUND_S)
        assert sum(spare.loader.loads.count(Span(4, 8)) for spare in spares) == 1
        assert ["4:8"] in [spare.spans for spare in spares]


@pytest.mark.parametrize("seed", range(1, 3))
async def test_no_server_uncovers_a_block_by_relying_on_one_that_also_moves(seed: int) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        # Two servers of the same blocks look at the same time, and each is drawn to another gap.
        spares = [await swarm.serve("2:4") for _ in range(2)]
        for spare, disk in zip(spares, ({0, 1}, {6, 7}), strict=True):
            spare.loader.disk = frozenset(disk)
            spare.start_moving(seed)
        tasks.start_soon(swarm.watch_coverage, range(2, 4))
        await trio.sleep(2 * ROUND_S)


async def test_a_named_span_and_the_only_server_of_a_block_stay() -> None:
    async with open_swarm("0:4") as swarm:
        lonely = await swarm.serve("4:8", moves=True)
        await swarm.serve("0:4")
        await trio.sleep(2 * ROUND_S)
        assert lonely.spans == ["4:8"]
        assert [peer.spans for peer in swarm.peers[1:]] == [["0:4"], ["4:8"], ["0:4"]]


async def test_what_cannot_be_fetched_costs_no_session(caplog: pytest.LogCaptureFixture) -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        spare.loader.unfetchable[Span(4, 8)] = DiskFullError("the disk is full")
        await trio.sleep(2 * ROUND_S)
        assert spare.loader.loads == []
        assert spare.states() == {"0:4": "online"}
        assert "cannot move to other blocks: the disk is full; still serving 0:4" in caplog.text
        spare.loader.unfetchable.clear()
        await until(lambda: spare.spans == ["4:8"], 20 * ROUND_S)


async def test_a_load_that_fails_goes_back_and_is_tried_again_ever_later(caplog: pytest.LogCaptureFixture) -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        spare.loader.failing[Span(4, 8)] = CheckpointError("a shard is damaged")
        times = []
        spare.loader.watch = lambda: times.append(trio.current_time())
        await until(lambda: len(spare.loader.loads) == 6, 40 * ROUND_S)
        await trio.sleep(30)
        assert spare.loader.loads == [Span(4, 8), Span(0, 4)] * 3
        assert spare.states() == {"0:4": "online"}
        assert "cannot load blocks 4:8: a shard is damaged; going back to 0:4" in caplog.text
        assert times[4] - times[2] > 2 * LOOK_S * (1 - LOOK_SPREAD) * 2
        async with swarm.session() as session:
            assert session is not None
        spare.loader.failing.clear()
        await until(lambda: spare.spans == ["4:8"], 40 * ROUND_S)


async def test_where_not_even_the_old_span_loads_nothing_is_announced_until_it_does() -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        spare.loader.failing = {Span(4, 8): OSError("gone"), Span(0, 4): OSError("gone too")}
        await until(lambda: len(spare.loader.loads) >= 3)
        await until(lambda: spare.loader.loading is None and spare.states() == {})
        spare.loader.failing.clear()
        await until(lambda: spare.states() == {"0:4": "online"}, 4000)


async def test_a_server_that_sees_only_a_part_of_the_swarm_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with open_swarm("0:4", "0:4", "0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        # The bootstrap peer and two servers are away, as far as it can tell; the gap it sees would be one of many.
        hosts = [f"10.0.0.{number}" for number in range(1, 4)]
        for host in hosts:
            swarm.network.partition("10.0.0.5", host)
        await trio.sleep(2 * ROUND_S)
        assert spare.loader.loads == []
        assert "cannot see the whole swarm" in caplog.text
        for host in hosts:
            swarm.network.heal("10.0.0.5", host)
        await until(lambda: spare.spans == ["4:8"], 4 * ROUND_S)


PHASES: dict[str, Callable[[Peer], bool]] = {
    "intending": lambda peer: peer.states() == {"0:4": "online", "4:8": "joining"},
    "draining": lambda peer: peer.states().get("0:4") == "draining",
    "loading": lambda peer: peer.loader.loading == Span(4, 8),
    "going back": lambda peer: peer.loader.loading == Span(0, 4),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_cancelled_in_any_phase_a_peer_serves_what_it_says(phase: str) -> None:
    async with open_swarm("4:8") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        if phase == "going back":
            spare.loader.failing[Span(4, 8)] = CheckpointError("damaged")
        async with swarm.session() as session:
            row = tokens(8)
            expected = fake_forward(row, Span(0, 8))
            assert torch.equal(await session.step(row[:4], want="all"), expected[:4])
            await swarm.serve("0:4")
            await swarm.serve("0:4")
            for _ in range(40000):
                if PHASES[phase](spare):
                    break
                await trio.sleep(0.1)
            else:
                raise AssertionError(f"it was never {phase}")
            assert spare.rebalancer is not None
            spare.rebalancer.stop()
            await trio.sleep(60)
            still = [] if phase in ("loading", "going back") else ["0:4"]
            assert spare.spans == still
            assert spare.states() == dict.fromkeys(still, "online")
            assert torch.equal(await session.step(row[4:], want="all"), expected[4:])
            assert session.failovers == (0 if still else 1)
            offers = await swarm.peers[1].discovery.directory.servers(MODEL, BLOCKS, max_age_s=0.0)
            said = {str(offer.span): offer.record.state for offer in offers if offer.peer_id == spare.identity.peer_id}
            assert said == dict.fromkeys(still, "online")


@pytest.mark.real_time
async def test_others_hear_of_a_first_span_before_it_is_loaded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, first = MemoryNetwork(), "/ip4/10.0.0.1/tcp/4000/ws"
    spec = peerd.ServeSpec(tiny_llama, 4, kv_tokens=64, throughput=100.0, memory_bytes=2**30)
    seen: list[dict[int, str]] = []
    load_served = span_loader.load_served

    async def load_while_others_look(*arguments: Any) -> Any:
        words: dict[int, str] = {}
        while not any("joining" in word for word in words.values()):
            # A machine with much to do may not answer in time.
            with suppress(PartialView):
                holdings = await bootstrap.discovery.directory.holdings(digest, blocks)
                words = {one.record.slot: f"{one.record.span} {one.record.state}" for one in holdings}
        seen.append(words)
        return await load_served(*arguments)

    monkeypatch.setattr(span_loader, "load_served", load_while_others_look)
    with open_checkpoint(tiny_llama) as checkpoint:
        digest, blocks = checkpoint.model_digest, checkpoint.block_count
    async with (
        peerd.open_peer(transport=network.transport("10.0.0.1"), listen=[first]) as bootstrap,
        peerd.open_peer(
            transport=network.transport("10.0.0.2"),
            listen=["/ip4/10.0.0.2/tcp/4000/ws"],
            bootstrap=[f"{first}/p2p/{bootstrap.peer_id}"],
            serve=[spec],
        ) as server,
    ):
        await server.serve(replace(spec, blocks=Span(1, 3)))
        with pytest.raises(CheckpointError):
            await server.serve(replace(spec, blocks=Span(0, 1), adapters=(("none", "/nowhere"),)))
        assert [str(served.span) for served in server.served] == ["0:4", "1:3"]
        assert server._spans is not None
        assert len(server._spans._slots) == 2, "the slot is free again"
    assert [{slot % 8: words for slot, words in one.items()} for one in seen] == [
        {0: "0:4 joining"},
        {0: "0:4 online", 1: "1:3 joining"},
        {0: "0:4 online", 1: "1:3 online", 2: "0:1 joining"},
    ]


@pytest.mark.real_time
async def test_a_host_without_memory_is_an_error_that_a_move_survives(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*arguments: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(span_loader, "load", too_much)
    with open_checkpoint(tiny_llama) as checkpoint, pytest.raises(MemoryError, match="blocks 0:2 do not fit") as caught:
        await span_loader.load_served(peerd.ServeSpec(tiny_llama), checkpoint, Span(0, 2))
    assert isinstance(caught.value, LOAD_ERRORS)


def rebalancers(peer: peerd.Peer) -> int:
    """How many of the peer's spans move by themselves."""
    return sum(isinstance(mover, Rebalancer) for mover in peer._spans._movers)


@pytest.mark.real_time
async def test_only_a_span_that_nobody_named_on_one_device_moves(tiny_llama: Path) -> None:
    def spec(blocks: Span | int | None, **more: Any) -> peerd.ServeSpec:
        return peerd.ServeSpec(tiny_llama, blocks, kv_tokens=64, throughput=100.0, memory_bytes=2**30, **more)

    orders = {
        spec(Span(0, 4)): 0,
        spec(4): 1,
        spec(4, stay=True): 0,
        spec(4, device="cpu,cpu"): 0,
        # All blocks: there is nowhere to go.
        spec(None): 0,
    }
    listen = "/ip4/10.0.0.1/tcp/4000/ws"
    transport = MemoryNetwork().transport("10.0.0.1")
    async with peerd.open_peer(transport=transport, listen=[listen], serve=[spec(Span(0, 1))]) as peer:
        for order, moving in orders.items():
            before = rebalancers(peer)
            await peer.serve(order)
            assert rebalancers(peer) - before == moving, order


@dataclass
class Reloading:
    """A peer whose span is loaded again when its device fails."""

    peer: Peer
    reloader: Reloader

    @classmethod
    async def of(cls, swarm: Swarm, span: str) -> Reloading:
        peer = await swarm.serve(span)
        swap = SpanSwap(peer.slot, peer.loader, peer.server, peer.discovery, Random(1), Containment(is_strict=False))
        reloader = Reloader(peer.slot, swap, peer.server, Random(1))
        peer.tasks.start_soon(reloader.run)
        return cls(peer, reloader)

    def break_down(self) -> None:
        [served] = self.peer.server.spans
        served.task.break_down("its device is lost")


async def test_a_span_whose_device_fails_is_withdrawn_and_loaded_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        connections = dict(own.peer.discovery._connections.live)
        async with swarm.session():
            own.break_down()
            await until(lambda: own.peer.states() == {"4:8": "joining"}, 5)
            assert own.peer.spans == []
        await until(lambda: own.peer.states() == {"4:8": "online"}, 60)
        assert own.peer.loader.loads == [Span(4, 8)]
        assert "blocks 4:8 are out of service: its device is lost" in caplog.text
        # Neither the identity nor the connections went with the span.
        assert own.peer.discovery._connections.live.items() >= connections.items()
        async with swarm.session() as session:
            assert session is not None


async def test_a_span_that_fails_again_soon_is_loaded_ever_later() -> None:
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        loads: list[float] = []
        own.peer.loader.watch = lambda: loads.append(trio.current_time())

        async def pause_s() -> float:
            began, count = trio.current_time(), len(loads)
            own.break_down()
            await until(lambda: len(loads) > count and own.peer.states() == {"4:8": "online"}, 1000)
            return loads[-1] - began

        pauses = [await pause_s() for _ in range(3)]
        assert pauses[0] < 10
        assert 45 < pauses[1] < 80
        assert 90 < pauses[2] < 160
        await trio.sleep(STEADY_S)
        assert await pause_s() < 10


async def test_a_device_on_which_nothing_loads_any_more_costs_the_span_and_nothing_else() -> None:
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        # No error that anybody has a name for.
        own.peer.loader.failing[Span(4, 8)] = torch.AcceleratorError("CUDA error: device-side assert triggered")
        own.break_down()
        await until(lambda: len(own.peer.loader.loads) >= 3, 1000)
        await until(lambda: own.peer.states() == {}, 60)
        own.peer.loader.failing.clear()
        await until(lambda: own.peer.states() == {"4:8": "online"}, 1000)


async def test_a_peer_that_leaves_loads_nothing_again() -> None:
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        own.reloader.stop()
        own.break_down()
        await trio.sleep(100)
        assert own.peer.loader.loads == []

"""Simulates more clients than two servers have room for, with the daemon's own server, client and announcements.

It replaces the network between them, the DHT (one board, which all read after a moment) and the arithmetic of the
blocks. Time is virtual. To tell whether clients ask too often, it notes the sender and time of every `open` that
reaches a server, and how long the client of each session waited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import torch
import trio

from peerd.client.finding.finder import Patience, SwarmFinder
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.opener import ChainOpener, Terms
from peerd.client.session.session import Session
from peerd.net.connections import Connections, Stream, open_connections
from peerd.net.handlers import StreamHandler
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.session import INFER_PROTOCOL
from peerd.protocol.records.envelope import (
    Announcement,
    PeerRecord,
    ServerRecord,
    SignedRecord,
    VerifiedRecord,
    open_record,
)
from peerd.protocol.records.keys import keys_of
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span
from peerd.routing.dht.record_sets import RecordKey
from peerd.routing.dht.store import RecordStore, StoreLimits
from peerd.routing.directory.announcer import Announcer
from peerd.routing.directory.directory import Directory
from peerd.routing.failures.track_record import TrackRecord
from peerd.server.engine_task import EngineTask
from peerd.server.served_spans import ServedSpan
from peerd.server.server import Server
from peerd.spans.loading import LoadedSpan
from peerd.spans.slots import Slots
from peerd.testing.fake_engine import FakeEngine, fake_forward
from peerd.testing.network import MemoryNetwork
from peerd.trio_tools import open_tasks

EPOCH = 1_800_000_000.0
MODEL = bytes(range(32))
BLOCKS = Span(0, 4)
WIDTH = 8
# The delay one way, and until the board shows an announcement or answers.
LATENCY_S = 0.02
BOARD_S = 0.3
STEP_S = 0.02


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    """What to simulate. Each client asks `answers` times: a session of `steps` steps with `pause_s` between them.

    slots: the sessions that a server has room for. later: seconds until each further server comes.
    """

    clients: int = 50
    servers: int = 2
    slots: int = 4
    answers: int = 2
    steps: int = 4
    pause_s: float = 1.0
    later: tuple[float, ...] = ()
    busy_s: float = 120.0
    seed: int = 1

    @property
    def ideal_s(self) -> float:
        """The least time in which the first servers could do all of the work, with no slot ever empty."""
        session_s = self.steps * (STEP_S + 2 * LATENCY_S) + (self.steps - 1) * self.pause_s
        return self.clients * self.answers * session_s / (self.servers * self.slots)


def unix_now() -> float:
    return EPOCH + trio.current_time()


class Board:
    """A DHT of one place: a real store of records, reached after a delay."""

    def __init__(self) -> None:
        self._store = RecordStore(unix_now, StoreLimits())

    async def put(self, *records: SignedRecord) -> int:
        await trio.sleep(BOARD_S)
        for record in records:
            body = _opened(record).body
            for key in keys_of(body, record.peer_id):
                self._store.put(key, record.encode(), storer=record.peer_id)
        return 20

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        await trio.sleep(BOARD_S)
        return [self._store.get(one.key) for one in wanted]


def _opened(record: SignedRecord) -> VerifiedRecord:
    return open_record(record, now=unix_now())


class _Seq:
    def load(self) -> int:
        return 0

    async def save(self, seq: int) -> None:
        await trio.lowlevel.checkpoint()


@dataclass(eq=False)
class Serving:
    """A server, and the time and sender of each `open` that reached it."""

    identity: Identity
    came_s: float
    opens: list[tuple[float, PeerId]] = field(default_factory=list)
    announced: list[ServerRecord] = field(default_factory=list)
    sessions: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One session of a client: when it was wanted, opened and over, or the error that its client got."""

    client: PeerId
    wanted_s: float
    opened_s: float
    ended_s: float
    server: str = ""
    error: PeerdError | None = None


class Overload:
    """Runs a plan. `serving` and `answers` then have the results."""

    def __init__(self, plan: OverloadPlan) -> None:
        self.plan = plan
        self.network = MemoryNetwork(latency_s=LATENCY_S)
        self.board = Board()
        self.serving: list[Serving] = []
        self.answers: list[Answer] = []
        self._random = Random(plan.seed)
        self._next = 1

    async def run(self) -> None:
        """Run until every client has all its answers or errors."""
        async with open_tasks() as tasks:
            for _ in range(self.plan.servers):
                await tasks.start(self._serve)
            async with trio.open_nursery() as clients:
                for _ in range(self.plan.clients):
                    clients.start_soon(self._ask)
                for later_s in self.plan.later:
                    tasks.start_soon(self._serve_later, later_s)
            tasks.cancel_scope.cancel()

    @property
    def took_s(self) -> float:
        """The time until the last answer."""
        return max(answer.ended_s for answer in self.answers) - min(answer.wanted_s for answer in self.answers)

    def opens_a_minute(self) -> dict[PeerId, int]:
        """For each client the most `open`s that it sent, to all servers together, within any minute."""
        times: dict[PeerId, list[float]] = {}
        for at, client in sorted(one for serving in self.serving for one in serving.opens):
            times.setdefault(client, []).append(at)
        return {
            client: max(sum(start <= at < start + 60 for at in sent) for start in sent)
            for client, sent in times.items()
        }

    def split(self) -> Counter[str]:
        """How many sessions each server had."""
        return Counter(answer.server for answer in self.answers if answer.error is None)

    def _new(self) -> tuple[str, Identity]:
        number, self._next = self._next, self._next + 1
        return f"10.0.{number // 250}.{number % 250 + 1}", Identity.from_seed(number.to_bytes(32, "big"))

    async def _serve_later(self, seconds: float) -> None:
        await trio.sleep(seconds)
        await self._serve()

    async def _serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        ip, identity = self._new()
        serving = Serving(identity, trio.current_time())
        self.serving.append(serving)
        engine = FakeEngine(BLOCKS, hidden_size=WIDTH, kv_tokens=self.plan.slots * self._tokens)
        served = ServedSpan(MODEL, self._tokens, EngineTask(engine, run_batch=_run_batch))
        server = Server(unix_now)
        handlers: dict[str, StreamHandler] = dict(server.handlers)
        handlers[INFER_PROTOCOL] = self._noting(serving, handlers[INFER_PROTOCOL])
        async with open_tasks() as tasks:
            await tasks.start(server.run)
            listen = [Multiaddr.parse(f"/ip4/{ip}/tcp/4000/ws")]
            async with open_connections(
                identity, transport=self.network.transport(ip), listen=listen, handlers=handlers, now=unix_now
            ) as connections:
                server.attach(connections)
                announcer = self._announcer(serving, server, served, connections)
                tasks.start_soon(announcer.run)
                await announcer.wait_announced()
                task_status.started()
                await trio.sleep_forever()

    def _announcer(self, serving: Serving, server: Server, served: ServedSpan, connections: Connections) -> Announcer:
        engine = cast(Any, served.task.engine)
        loaded = LoadedSpan(engine, "float32", "none", ("exact",), 1000.0, (), served.adapter_room, cast(Any, None))
        expected = ServerRecord(
            seq=0,
            expires=0.0,
            model=MODEL,
            span=BLOCKS,
            state="joining",
            dtype="float32",
            quantization="none",
            codecs=("exact",),
            throughput=1000.0,
            free_tokens=0,
            max_length=self._tokens,
        )

        def bodies() -> list[Announcement]:
            records = slots.records()
            serving.announced += records
            addresses = tuple(str(address) for address in connections.listen_addresses)
            return [*records, PeerRecord(seq=0, expires=0.0, addresses=addresses)]

        announcer = Announcer(serving.identity, self.board, _Seq(), bodies, unix_now)
        slots = Slots(server, announcer.announce_soon)
        slots.add(slots.reserve(expected), served, loaded)
        return announcer

    def _noting(self, serving: Serving, handle: Callable[[Stream], Any]) -> Callable[[Stream], Any]:
        async def noting(stream: Stream) -> None:
            serving.opens.append((trio.current_time(), stream.peer))
            await handle(stream)

        return noting

    @property
    def _tokens(self) -> int:
        # One page, the least that a session takes.
        return 16

    async def _ask(self) -> None:
        ip, identity = self._new()
        rng = Random(ip)
        await trio.sleep(rng.random())
        async with (
            open_tasks() as tasks,
            open_connections(identity, transport=self.network.transport(ip), handlers={}, now=unix_now) as connections,
        ):
            directory = Directory(self.board, unix_now)
            finder = SwarmFinder(directory, TrackRecord(trio.current_time), MODEL, len(BLOCKS), rng)
            opener = ChainOpener(connections, identity, directory, unix_now, rng.randbytes)
            terms = Terms(MODEL, SessionSize(self._tokens, max_rollback=self._tokens), 4, "float32", "exact", 2000)
            for _ in range(self.plan.answers):
                spec = SessionSpec(BLOCKS, WIDTH, terms, Patience(busy_s=self.plan.busy_s))
                session = Session(SessionTools(finder, opener, rng), spec)
                await tasks.start(session.run)
                self.answers.append(await self._use(session, identity.peer_id))
                session.close()
            tasks.cancel_scope.cancel()

    async def _use(self, session: Session, client: PeerId) -> Answer:
        wanted_s = opened_s = trio.current_time()
        row = torch.arange(self.plan.steps * WIDTH, dtype=torch.float32).reshape(-1, WIDTH) % 7
        server = ""
        try:
            for step in range(self.plan.steps):
                if step:
                    await trio.sleep(self.plan.pause_s)
                result = await session.step(row[step : step + 1])
                if not step:
                    opened_s, server = trio.current_time(), session.chain[0].peer
                assert torch.equal(result, fake_forward(row[: step + 1], BLOCKS)[-1:])
        except PeerdError as error:
            return Answer(client, wanted_s, opened_s, trio.current_time(), server, error)
        return Answer(client, wanted_s, opened_s, trio.current_time(), server)


async def _run_batch(run: Callable[[Any], Any], batch: Any) -> Any:
    await trio.sleep(STEP_S)
    return run(batch)

"""A swarm of DHT peers in virtual time, with churn: real announcers, lookups, tables and stores.

Peers announce spans as a daemon does, crash, leave and are replaced. Clients, which are in no peer's table, look the
spans up. A lookup should find each server that was announced before the lookup began and still lives when it ends. It
must not find a peer that crashed longer ago than a record lives, or that left.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import trio

from benchmarks.simulated.dht_world import Node, Trace, World, purpose, trace, unix_now
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, SignedRecord, shards_of
from peerd.protocol.span import Span
from peerd.routing.dht.record_sets import addresses_of, servers_of
from peerd.routing.directory.announcer import TTL_S, Announcer

# The same value as in peerd/discovery/discovery.py.
REFRESH_S = 60.0
LEAVE_S = 5.0
# How many tables are sampled to measure the tables' quality.
SAMPLED_TABLES = 50


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model of the swarm: its number of blocks, and the share of the servers that serve it."""

    blocks: int
    share: float


MODELS = (ModelPlan(80, 0.4), ModelPlan(32, 0.3), ModelPlan(126, 0.2), ModelPlan(16, 0.1))
# All servers are under one key, because 16 blocks are one shard.
ONE_SHARD = (ModelPlan(16, 1.0),)


@dataclass(frozen=True, slots=True)
class SwarmPlan:
    """What to simulate. serving: the share of the peers that announce a span; the others only take part in the DHT.

    churn: the share of the peers that is replaced in an hour, half of them after a crash. settle_s: the time after all
        peers joined, before lookups, churn and counting begin.
    """

    peers: int = 1000
    serving: float = 0.5
    clients: int = 50
    hours: float = 1.0
    churn: float = 0.3
    loss: float = 0.01
    models: tuple[ModelPlan, ...] = MODELS
    lookup_period_s: float = 60.0
    joins_a_second: float = 10.0
    settle_s: float = 60.0
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a client's lookup. of_addresses: whether it asked for one server's addresses, not for a shard's
    servers.

    ghosts: found although gone. forbidden: ghosts that were gone for longer than a record lives, or that had left.
    """

    of_addresses: bool
    expected: int
    missing: int
    ghosts: int
    forbidden: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """A client's lookup, and its cost."""

    found: Found
    hops: int
    requests: int
    seconds: float


@dataclass(eq=False)
class Member:
    """A peer of the DHT, the span that it announces if any, and when it came and went."""

    node: Node
    model: int = 0
    span: Span | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    joined: bool = False
    visible_from_s: float = math.inf
    crashed_s: float = math.inf
    left_s: float = math.inf

    def load(self) -> int:
        return 0

    async def save(self, seq: int) -> None:
        await trio.lowlevel.checkpoint()

    async def put(self, *records: SignedRecord) -> int:
        """Announce as the announcer's sink, and note when others could first find us."""
        holders = await self.node.dht.put(*records)
        if holders:
            self.visible_from_s = min(self.visible_from_s, trio.current_time())
        return holders

    def bodies(self) -> list[ServerRecord | PeerRecord]:
        """The announcement of a server of this span."""
        if self.span is None:
            return []
        server = ServerRecord(
            seq=0,
            expires=0.0,
            model=_digest(self.model),
            span=self.span,
            state="online",
            dtype="bfloat16",
            quantization="none",
            codecs=("exact", "int8"),
            throughput=1000.0,
            free_tokens=65536,
            max_length=8192,
            block_roots=tuple(bytes(32) for _ in shards_of(self.span)),
        )
        return [server, PeerRecord(seq=0, expires=0.0, addresses=tuple(map(str, self.node.addresses)))]


class Swarm:
    """Runs a plan. `lookups`, `lively_contacts` and the world's nodes then have the results."""

    def __init__(self, plan: SwarmPlan) -> None:
        self.plan = plan
        self.random = Random(plan.seed)
        self.world = World(self.random, plan.loss)
        self.members: dict[PeerId, Member] = {}
        self.gone: dict[PeerId, Member] = {}
        self.clients: list[Node] = []
        self.lookups: list[Lookup] = []
        # Samples of the share of the contacts in tables that live.
        self.lively_contacts: list[float] = []
        self.ended_s = 0.0

    async def run(self) -> None:
        """Let all peers join, then churn and look up for the plan's hours."""
        plan = self.plan
        async with trio.open_nursery() as self._tasks:
            await self._fill()
            await trio.sleep(plan.settle_s)
            self._begin_counting()
            self._tasks.start_soon(self._churn)
            for client in self.clients:
                self._tasks.start_soon(self._ask, client)
            end_s = trio.current_time() + plan.hours * 3600
            while trio.current_time() < end_s:
                await trio.sleep(min(600.0, end_s - trio.current_time()))
                self.lively_contacts.append(self._share_of_lively_contacts())
            self.ended_s = trio.current_time()
            self._tasks.cancel_scope.cancel()

    def bytes_an_hour(self, *, serving: bool | None) -> Counter[str]:
        """Bytes by purpose, sent and received, of a peer that serves, of one that does not, or (None) of a client."""
        total: Counter[str] = Counter()
        hours = 0.0
        everybody = {**self.gone, **self.members}
        for node in self.world.nodes.values():
            member = everybody.get(node.peer_id)
            if serving is not (None if member is None else member.span is not None):
                continue
            ended_s = self.ended_s if member is None else min(member.crashed_s, member.left_s, self.ended_s)
            hours += max(0.0, ended_s - node.counted_from_s) / 3600
            total += node.bytes
        return Counter({kind: round(count / hours) for kind, count in total.items()}) if hours else Counter()

    def table_size(self) -> float:
        """The mean number of contacts that a peer of the DHT has."""
        return sum(len(member.node.dht.contacts) for member in self.members.values()) / len(self.members)

    async def _fill(self) -> None:
        for number in range(self.plan.peers):
            self._add_member()
            # The first peer is there before others ask for it.
            await trio.sleep(self.random.expovariate(self.plan.joins_a_second) if number else 5.0)
        for _ in range(self.plan.clients):
            client = self.world.add(client=True)
            self.clients.append(client)
            await self._join(client)
            self._tasks.start_soon(self._maintain, client)

    def _begin_counting(self) -> None:
        for node in self.world.nodes.values():
            node.bytes.clear()
            node.asked.clear()
            node.counted_from_s = trio.current_time()

    # Peers of the DHT.

    def _add_member(self) -> None:
        member = Member(self.world.add())
        if self.random.random() < self.plan.serving:
            shares = [model.share for model in self.plan.models]
            (member.model,) = self.random.choices(range(len(shares)), shares)
            blocks = self.plan.models[member.model].blocks
            length = self.random.randint(2, min(16, blocks))
            start = self.random.randint(0, blocks - length)
            member.span = Span(start, start + length)
        self.members[member.node.peer_id] = member
        self._tasks.start_soon(self._live, member)

    async def _live(self, member: Member) -> None:
        node = member.node
        announcer = Announcer(node.identity, member, member, member.bodies, unix_now)
        with member.scope:
            await self._join(node)
            member.joined = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._maintain, node)
                purpose.set("announcing")
                await announcer.run()
        if node.alive and not self._tasks.cancel_scope.cancel_called:
            with trio.move_on_after(LEAVE_S):
                await announcer.leave()
            member.left_s = trio.current_time()
        node.alive = False

    async def _join(self, node: Node) -> None:
        purpose.set("joining")
        while known := [m.node.contact for m in self.members.values() if m.joined and m.node.alive]:
            if await node.dht.bootstrap(self.random.sample(known, min(3, len(known)))):
                return
            await trio.sleep(1)

    async def _maintain(self, node: Node) -> None:
        purpose.set("maintenance")
        await trio.sleep(self.random.uniform(0, REFRESH_S))
        while True:
            await node.dht.refresh()
            await trio.sleep(REFRESH_S)

    async def _churn(self) -> None:
        rate = self.plan.churn * self.plan.peers / 3600
        while rate:
            await trio.sleep(self.random.expovariate(rate))
            member = self.random.choice(list(self.members.values()))
            del self.members[member.node.peer_id]
            self.gone[member.node.peer_id] = member
            if self.random.random() < 0.5:
                member.crashed_s = trio.current_time()
                member.node.alive = False
            member.scope.cancel()
            self._add_member()

    def _share_of_lively_contacts(self) -> float:
        sampled = self.random.sample(list(self.members.values()), min(SAMPLED_TABLES, len(self.members)))
        contacts = [contact.peer_id for member in sampled for contact in member.node.dht.contacts]
        return sum(self.world.nodes[peer_id].alive for peer_id in contacts) / max(1, len(contacts))

    # Clients.

    async def _ask(self, client: Node) -> None:
        purpose.set("lookups")
        while True:
            await trio.sleep(self.random.expovariate(1 / self.plan.lookup_period_s))
            visible = [m for m in self.members.values() if m.visible_from_s < trio.current_time()]
            if visible:
                server = self.random.choice(visible)
                assert server.span is not None
                await self._look_up(client, server.model, self.random.choice(shards_of(server.span)))
                await self._look_up_addresses(client, server)

    async def _look_up(self, client: Node, model: int, shard: int) -> None:
        start_s, traced = trio.current_time(), Trace()
        expected = {
            peer_id
            for peer_id, m in self.members.items()
            if m.model == model and m.span and shard in shards_of(m.span) and m.visible_from_s < start_s
        }
        trace.set(traced)
        found = await client.dht.get(servers_of(_digest(model), shard))
        online = {r.peer_id for r in found if isinstance(r.body, ServerRecord) and r.body.state != "offline"}
        missing = [peer_id for peer_id in expected - online if peer_id in self.members]
        gone = [self.gone[peer_id] for peer_id in online if peer_id in self.gone]
        forbidden = sum(start_s > min(member.crashed_s + TTL_S, member.left_s) for member in gone)
        self._note(start_s, traced, Found(False, len(expected), len(missing), len(gone), forbidden))

    async def _look_up_addresses(self, client: Node, server: Member) -> None:
        start_s, traced = trio.current_time(), Trace()
        trace.set(traced)
        found = await client.dht.get(addresses_of(server.node.peer_id))
        missing = not found and server.node.peer_id in self.members
        self._note(start_s, traced, Found(True, 1, int(missing), 0, 0))

    def _note(self, start_s: float, traced: Trace, found: Found) -> None:
        self.lookups.append(Lookup(found, traced.hops, traced.requests, trio.current_time() - start_s))


def _digest(model: int) -> bytes:
    return bytes([model]) * 32

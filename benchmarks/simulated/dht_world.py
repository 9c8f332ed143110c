"""A simulated network around real DHT peers: delays by distance, lost answers, dials, and bytes counted by purpose.

Implements `DhtTransport` for any number of peers under a mock clock. It must be fast, because an hour of a thousand
peers is millions of questions. So headers are measured but not decoded again, and packets arrive on a time grid.
"""

from __future__ import annotations

import math
from collections import Counter
from contextvars import ContextVar
from random import Random

import trio

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.encoding.packing import pack
from peerd.protocol.errors import InvalidRequest, PeerFault
from peerd.protocol.identity import Identity, PeerId
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.messages import Packet
from peerd.routing.dht.rpc import Sighting
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import Contact

EPOCH = 1_800_000_000.0
# A question's bytes beside headers and records, both ways together: its stream's frames, each with a tag, a websocket
# header and 52 bytes of TCP and IP. Counted on a connection of two daemons in memory: 267 to 429.
EXCHANGE_BYTES = 420
# The same for a connection: 1810 for Noise, the hello and the first ping; the rest is for TCP and the websocket.
DIAL_BYTES = 3000
# TCP, websocket and Noise need these round trips before the first question.
DIAL_ROUND_TRIPS = 3
# A connection that carried nothing for this long is dialled again.
CONNECTION_IDLE_S = 120.0
# Packets arrive on this grid. Without it the mock clock's jumps would cost more than the work that the packets cause.
TICK_S = 0.005

purpose: ContextVar[str] = ContextVar("purpose", default="join")
"""The purpose of the present task's questions, for the count of bytes."""


class Trace:
    """How far a lookup reached: a peer is one hop farther than the first peer that named it."""

    def __init__(self) -> None:
        self.hops = 0
        self.requests = 0
        self._depths: dict[PeerId, int] = {}

    def answered(self, peer_id: PeerId, answer: Packet) -> None:
        depth = self._depths.setdefault(peer_id, 1)
        self.hops = max(self.hops, depth)
        for named, _ in answer.header.get("nodes", ()):
            self._depths.setdefault(named, depth + 1)


trace: ContextVar[Trace | None] = ContextVar("trace", default=None)
"""The trace of the present task's lookup."""


def unix_now() -> float:
    """The mock clock as unix seconds."""
    return EPOCH + trio.current_time()


class Node:
    """One peer: its DHT, its place in the world, and its bytes by purpose."""

    def __init__(self, world: World, number: int, *, client: bool) -> None:
        self.identity = Identity.from_seed(number.to_bytes(32, "big"))
        self.peer_id = self.identity.peer_id
        address = Multiaddr.parse(f"/ip4/10.{number >> 16}.{number >> 8 & 255}.{number & 255}/tcp/31330/ws")
        self.addresses = () if client else (address,)
        self.alive = True
        self.bytes: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.counted_from_s = trio.current_time()
        self.last_use: dict[PeerId, float] = {}
        # Two regions, as far apart as two shores of an ocean, in seconds one way, and this peer's own line.
        self._place = (world.random.random() * 0.09, world.random.random() * 0.05)
        self._line_s = 0.002 + world.random.expovariate(1 / 0.006)
        self.dht = Dht(
            self.peer_id,
            _Transport(world, self),
            RecordStore(unix_now),
            now=unix_now,
            random=Random(number),
            addresses=self.addresses,
        )

    @property
    def contact(self) -> Contact:
        return Contact(self.peer_id, self.addresses)

    def delay_to(self, other: Node) -> float:
        """Seconds one way."""
        return math.dist(self._place, other._place) + self._line_s + other._line_s

    def is_connected_to(self, other: Node) -> bool:
        used_s = max(self.last_use.get(other.peer_id, -math.inf), other.last_use.get(self.peer_id, -math.inf))
        return trio.current_time() - used_s <= CONNECTION_IDLE_S


class World:
    """All present and past peers, by PeerId."""

    def __init__(self, random: Random, loss: float) -> None:
        self.random = random
        self.nodes: dict[PeerId, Node] = {}
        self._loss = loss

    def add(self, *, client: bool = False) -> Node:
        """Add a peer that knows no other. Without addresses it is a client of the DHT."""
        node = Node(self, len(self.nodes) + 1, client=client)
        self.nodes[node.peer_id] = node
        return node

    def loses(self) -> bool:
        """Whether the next question or answer is lost."""
        return self.random.random() < self._loss


class _Transport:
    """Carries the questions of one peer."""

    def __init__(self, world: World, own: Node) -> None:
        self._world = world
        self._own = own

    def is_near(self, peer_id: PeerId) -> bool:
        return True

    def sighting(self, peer_id: PeerId) -> Sighting:
        """Nobody lies about addresses here."""
        return Sighting(frozenset(self._world.nodes[peer_id].addresses))

    async def find(self, contact: Contact) -> None:
        """Everybody has been found."""
        await trio.lowlevel.checkpoint()

    async def request(self, contact: Contact, packet: Packet) -> Packet:
        own, target, kind = self._own, self._world.nodes[contact.peer_id], purpose.get()
        delay_s = own.delay_to(target) * self._world.random.uniform(1.0, 1.3)
        round_trips = 1
        if not own.is_connected_to(target):
            round_trips += DIAL_ROUND_TRIPS
            for node in (own, target):
                node.bytes["dials"] += DIAL_BYTES if node.alive else 0
        question_bytes = _size(packet)
        own.asked[kind] += 1
        own.bytes[kind] += question_bytes
        if (traced := trace.get()) is not None:
            traced.requests += 1
        # One pause for all ways.
        arrives_s = trio.current_time() + 2 * delay_s * round_trips
        await trio.sleep_until(math.ceil(arrives_s / TICK_S) * TICK_S)
        if not target.alive or self._world.loses():
            await trio.sleep_forever()
        own.last_use[target.peer_id] = trio.current_time()
        try:
            answer = await target.dht.handle(own.peer_id, packet)
        except InvalidRequest as error:
            raise PeerFault(f"it found our request invalid: {error}") from error
        answer_bytes = _size(answer) + EXCHANGE_BYTES
        target.bytes[kind] += question_bytes + answer_bytes
        if self._world.loses():
            await trio.sleep_forever()
        own.bytes[kind] += answer_bytes
        if traced is not None:
            traced.answered(target.peer_id, answer)
        return answer


def _size(packet: Packet) -> int:
    return len(pack(packet.header)) + 8 + sum(len(record) + 2 for record in packet.records)

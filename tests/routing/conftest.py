"""A swarm in memory: DHT peers joined by a network with latency, loss and death, all under the mock clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import trio

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.encoding.packing import pack, unpack
from peerd.protocol.errors import ConnectFailed, InvalidRequest, PeerFault
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, sign_record
from peerd.protocol.span import Span
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.messages import Packet, pack_records, unpack_records
from peerd.routing.dht.rpc import Sighting
from peerd.routing.dht.store import RecordStore, StoreLimits
from peerd.routing.dht.table import Contact
from peerd.routing.directory.offer import Offer

EPOCH = 1_800_000_000.0
MODEL = bytes(range(32))


def _unix_now() -> float:
    return EPOCH + trio.current_time()


@dataclass
class Peer:
    identity: Identity
    addresses: tuple[Multiaddr, ...]
    store: RecordStore
    dht: Dht

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def contact(self) -> Contact:
        return Contact(self.peer_id, self.addresses)


@dataclass
class Network:
    """Carries packets as bytes. A request to a dead peer, or a lost one, is never answered."""

    random: Random
    loss: float = 0.0
    latency_s: tuple[float, float] = (0.005, 0.05)
    limits: StoreLimits | None = None
    peers: dict[PeerId, Peer] = field(default_factory=dict)
    dead: set[PeerId] = field(default_factory=set)
    requests: list[tuple[PeerId, PeerId, str]] = field(default_factory=list)
    # The public networks that peers are seen in, where not private; and who was not found by whom yet.
    networks: dict[PeerId, str] = field(default_factory=dict)
    on_the_internet: set[PeerId] = field(default_factory=set)
    unseen: set[tuple[PeerId, PeerId]] = field(default_factory=set)
    looked_for: list[tuple[PeerId, Contact]] = field(default_factory=list)
    # Peers that only reach each other.
    parted: set[PeerId] = field(default_factory=set)
    # Peers that answer as they like.
    liars: dict[PeerId, Callable[[Packet], Packet]] = field(default_factory=dict)

    def add(self, *, client: bool = False) -> Peer:
        return self.add_as(Identity.from_seed(len(self.peers).to_bytes(32, "big")), client=client)

    def add_as(self, identity: Identity, *, client: bool = False) -> Peer:
        """A peer with this identity, which knows nobody."""
        number = len(self.peers)
        address = Multiaddr.parse(f"/ip4/10.0.{number // 250}.{number % 250 + 1}/tcp/31330/ws")
        store = RecordStore(_unix_now, self.limits)
        transport = _Transport(self, identity.peer_id)
        addresses = () if client else (address,)
        dht = Dht(identity.peer_id, transport, store, now=_unix_now, random=Random(number), addresses=addresses)
        peer = Peer(identity, addresses, store, dht)
        self.peers[peer.peer_id] = peer
        return peer

    async def add_joined(self, count: int, *, client: bool = False) -> list[Peer]:
        """Add that many peers, each joined through a few of the existing ones."""
        added = []
        for _ in range(count):
            others = [peer for peer in self.peers.values() if peer.addresses]
            peer = self.add(client=client)
            seeds = self.random.sample(others, min(3, len(others)))
            await peer.dht.bootstrap([seed.contact for seed in seeds])
            added.append(peer)
        return added

    def side(self, peer_id: PeerId) -> bool:
        """On which side of a partition a peer is."""
        return peer_id in self.parted

    def kill(self, *peers: Peer) -> None:
        self.dead.update(peer.peer_id for peer in peers)


@dataclass
class _Transport:
    network: Network
    own: PeerId

    def sighting(self, peer_id: PeerId) -> Sighting:
        peer = self.network.peers.get(peer_id)
        if peer is None or (self.own, peer_id) in self.network.unseen:
            return Sighting()
        return Sighting(frozenset(peer.addresses), self.network.networks.get(peer_id, ""))

    def is_near(self, peer_id: PeerId) -> bool:
        return peer_id not in self.network.on_the_internet

    async def find(self, contact: Contact) -> None:
        self.network.looked_for.append((self.own, contact))
        await trio.sleep(self.network.random.uniform(*self.network.latency_s))
        self.network.unseen.discard((self.own, contact.peer_id))

    async def request(self, contact: Contact, packet: Packet) -> Packet:
        network = self.network
        network.requests.append((self.own, contact.peer_id, packet.header["type"]))
        await trio.sleep(network.random.uniform(*network.latency_s))
        lost = contact.peer_id in network.dead or network.side(self.own) != network.side(contact.peer_id)
        if lost or network.random.random() < network.loss:
            await trio.sleep_forever()
        target = network.peers.get(contact.peer_id)
        if target is None or not set(contact.addresses) & set(target.addresses):
            raise ConnectFailed(f"nobody to dial at {contact.addresses}")
        if target.peer_id in network.liars:
            answer = network.liars[target.peer_id](carried(packet))
        else:
            try:
                answer = await target.dht.handle(self.own, carried(packet))
            except InvalidRequest as error:
                raise PeerFault(f"it found our request invalid: {error}") from error
        await trio.sleep(network.random.uniform(*network.latency_s))
        return carried(answer)


def carried(packet: Packet) -> Packet:
    """The packet after a journey as bytes, within a message's limits."""
    header = pack(packet.header)
    assert len(header) <= 16 * 1024
    return Packet(unpack(header), unpack_records(pack_records(packet.records)))


@pytest.fixture
def network() -> Network:
    return Network(Random(1))


@pytest.fixture
def server_body() -> Callable[..., ServerRecord]:
    """Makes server records; every field has a default."""

    def make(**fields: Any) -> ServerRecord:
        defaults: dict[str, Any] = {
            "seq": 1,
            "expires": EPOCH + 300,
            "model": MODEL,
            "span": Span(0, 4),
            "state": "online",
            "dtype": "float32",
            "quantization": "none",
            "codecs": ("exact",),
            "throughput": 100.0,
            "free_tokens": 4096,
            "max_length": 2048,
        }
        return ServerRecord(**{**defaults, **fields})

    return make


@pytest.fixture
def peer_body() -> Callable[..., PeerRecord]:
    """Makes peer records; every field has a default."""

    def make(**fields: Any) -> PeerRecord:
        return PeerRecord(**dict[str, Any](seq=1, expires=EPOCH + 300, addresses=("/ip4/10.0.0.1/tcp/1/ws",)) | fields)

    return make


@pytest.fixture
def epoch() -> float:
    """The unix time at which the mock clock starts; `server_body` and `peer_body` expire 300 s later."""
    return EPOCH


@pytest.fixture
def unix_now() -> Callable[[], float]:
    """The mock clock as unix seconds."""
    return _unix_now


@pytest.fixture
def make_offer(server_body: Callable[..., ServerRecord], peer_body: Callable[..., PeerRecord]) -> Callable[..., Offer]:
    """Makes the offer of the peer with a number, for a span, with any fields of its record."""

    def make(number: int, span: str, **fields: object) -> Offer:
        identity = Identity.from_seed(number.to_bytes(32, "big"))
        body = server_body(span=Span.parse(span), **fields)
        return Offer(identity.peer_id, body, (), sign_record(identity, peer_body()))

    return make

"""The DHT as the rest of peerd uses it: get and put sets of signed records, join, stay connected.

Joins lookup, table, store and protocol, and runs their requests. Knows which answers to believe; knows
no connections. The difficulty is that any peer asked may be dead, old or lying: so every record is
checked here again, answers are united instead of chosen among, and replicas are counted, not assumed.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from random import Random

import trio
from kademlia.node import Node

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import SignedRecord, VerifiedRecord, keys_of, open_record, split_keys_of
from peerd.routing.dht.holders import Holders
from peerd.routing.dht.lookup import Crawl
from peerd.routing.dht.messages import (
    MAX_CONTACTS,
    MAX_STORED_AT_ONCE,
    REPLICAS,
    Outcome,
    Packet,
    contact_addresses,
)
from peerd.routing.dht.record_sets import PartialView, RecordKey, newest
from peerd.routing.dht.rpc import DhtProtocol, DhtTransport, FindReply
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import Contact, PeerNode, dump_contacts

log = logging.getLogger(__name__)

# Askers a lookup. With 30 % of 200 peers just dead, a median get took 0.21 s, against 0.36 s with Kademlia's 3,
# for 14 requests instead of 13.
ALPHA = 5
# Answers that a lookup of records waits for. Each record is with the 12 nearest of 20 s ago: of the 8 that are nearest
# now, one does not have it only if it came since.
QUORUM = 8
# Whom a renewal asks for newcomers: one of so many that are nearest, for the very nearest may be a liar.
WITNESSES = 4
# Lookups at a time; each has a few requests under way.
MAX_LOOKUPS = 16


class Dht:
    """One peer of the DHT. Start it with `bootstrap`, then call `refresh` once a minute.

    now: unix seconds, corrected (spec/records.md). random: chooses which places to look up to stay connected.
    addresses: where we can be dialled. () makes us a client, which asks but is in nobody's table.
    """

    def __init__(
        self,
        peer_id: PeerId,
        transport: DhtTransport,
        store: RecordStore,
        *,
        now: Callable[[], float],
        random: Random,
        addresses: Sequence[Multiaddr] = (),
    ) -> None:
        self._own = PeerNode(Contact(peer_id, contact_addresses(addresses)))
        self._store = store
        self._now = now
        self._protocol = DhtProtocol(self._own, store, transport, random)
        self._table = self._protocol.router
        self._random = random
        self._holders = Holders(REPLICAS, trio.current_time)
        # Where to start from if the table is empty: what `bootstrap` was given, and whom we knew a while ago.
        self._seeds: list[PeerNode] = []
        self._last_known: list[PeerNode] = []
        # Nobody was ever known: a swarm begins with us.
        self._is_first = True
        self._lookups = trio.Semaphore(MAX_LOOKUPS)

    def __repr__(self) -> str:
        role = "server" if self.addresses else "client"
        return f"<Dht {role} {self._own.contact.peer_id}: {len(self._table)} contacts, {len(self._store)} records>"

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        """Where others are told to dial us; changes as we learn whether we can be reached."""
        return self._protocol.addresses

    @addresses.setter
    def addresses(self, addresses: Sequence[Multiaddr]) -> None:
        self._protocol.addresses = contact_addresses(addresses)

    @property
    def contacts(self) -> list[Contact]:
        """The peers in our routing table."""
        return [node.contact for node in self._table]

    def dump(self) -> str:
        """The routing table, for `load_contacts` after a restart and `bootstrap` with what that returns."""
        return dump_contacts(self.contacts)

    async def bootstrap(self, contacts: Iterable[Contact]) -> int:
        """Join through any of these. Returns how many peers we know then; 0 means that nobody answered."""
        self._seeds = [PeerNode(contact) for contact in contacts if contact.peer_id != self._own.contact.peer_id]
        return await self._join()

    async def introduce(self) -> None:
        """Ask those around us, and all whom we know, who thereby hear where we are: after that has changed."""
        known = list(self._table)
        self._last_known = known or self._last_known
        nodes, _ = await self._look_up(Node(self._own.id), self._protocol.call_find_node)
        asked = {node.id for node in nodes}
        limit = trio.CapacityLimiter(ALPHA)

        async def ping(node: PeerNode) -> None:
            async with limit:
                await self._protocol.call_ping(node)

        async with trio.open_nursery() as nursery:
            for node in known:
                if node.id not in asked:
                    nursery.start_soon(ping, node)

    async def refresh(self) -> None:
        """Ping who is in doubt, look around where nothing was looked up for an hour, join again if alone."""
        async with trio.open_nursery() as nursery:
            for node in self._table.take_suspects():
                nursery.start_soon(self._protocol.call_ping, node)
        if len(self._table):
            self._last_known = list(self._table)
        else:
            # Our own network failed, more likely than everybody's at once.
            await self._join()
        await self._look_up_all(self._protocol.get_refresh_ids())

    async def get(self, wanted: RecordKey, *, whole: bool = False) -> list[VerifiedRecord]:
        """The valid records of the set, the newest of each slot, from a quorum of the peers nearest to its key.

        If it must be `whole`, raises PartialView where neither a quorum answered nor most of those who were asked,
        ourselves among them where we keep records.
        """
        records, is_split = await self._get_key(wanted.key, whole)
        if is_split and wanted.parts:

            async def add_part(key: bytes) -> None:
                found, _ = await self._get_key(key, whole)
                records.extend(found)

            async with trio.open_nursery() as nursery:
                for part in wanted.parts:
                    nursery.start_soon(add_part, part)
        return newest(records)

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        """`get` of several sets at once, in their order."""
        found: list[list[VerifiedRecord]] = [[] for _ in wanted]
        failures: list[PartialView] = []

        async def fill(index: int) -> None:
            try:
                found[index] = await self.get(wanted[index], whole=whole)
            except PartialView as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for index in range(len(wanted)):
                nursery.start_soon(fill, index)
        if failures:
            raise failures[0]
        return found

    async def put(self, *records: SignedRecord) -> int:
        """Store each record with the peers nearest to each of its keys, or to the key's part if that is full.

        Returns how many peers hold it, of the record and key with the fewest. Raises RemoteProtocolError
        for a record that nobody would take.
        """
        parts: dict[bytes, dict[bytes, bytes | None]] = defaultdict(dict)
        for signed in records:
            record = open_record(signed, now=self._now())
            keys = keys_of(record.body, record.peer_id)
            split_keys = split_keys_of(record.body, record.peer_id) or (None,) * len(keys)
            for key, part in zip(keys, split_keys, strict=True):
                parts[key][signed.encode()] = part
        counts: list[int] = []

        async def put_all(key: bytes, part_of: dict[bytes, bytes | None]) -> None:
            data = list(part_of)
            for at in range(0, len(data), MAX_STORED_AT_ONCE):
                batch = data[at : at + MAX_STORED_AT_ONCE]
                for one, outcomes in zip(batch, await self._put_key(key, batch), strict=True):
                    counts.append(await self._count_replicas(one, outcomes, part_of[one]))

        async with trio.open_nursery() as nursery:
            for key, part_of in parts.items():
                nursery.start_soon(put_all, key, part_of)
        return min(counts, default=0)

    async def handle(self, sender: PeerId, packet: Packet, source: IPv4Address | IPv6Address | None = None) -> Packet:
        """Answer a peer; `sender` is who its connection proves it to be, `source` the address it is seen at.

        Raises InvalidRequest.
        """
        await trio.lowlevel.checkpoint()
        return self._protocol.answer(sender, packet, source)

    async def _join(self) -> int:
        await self._look_up(Node(self._own.id), self._protocol.call_find_node)
        # Kademlia paper, 2.3: then the ranges farther away, for each has a bucket of its own to fill.
        await self._look_up_all(self._protocol.get_refresh_ids(self._table.buckets))
        return len(self._table)

    async def _look_up_all(self, ids: Sequence[bytes]) -> None:
        async with trio.open_nursery() as nursery:
            for place in ids:
                nursery.start_soon(self._look_up, Node(place), self._protocol.call_find_node)

    async def _look_up(
        self,
        target: Node,
        ask: Callable[[PeerNode, Node], Awaitable[FindReply | None]],
        quorum: int | None = None,
        count: int = MAX_CONTACTS,
    ) -> tuple[list[PeerNode], Crawl[FindReply]]:
        """The nearest peers that answered, nearest first, and the lookup with all answers."""
        async with self._lookups:
            self._table.touch(target)
            start = self._table.find_neighbors(target) or [*self._seeds, *self._last_known]
            self._is_first &= not start
            crawl: Crawl[FindReply] = Crawl(self._own, target, start, ask, ksize=count, alpha=ALPHA, quorum=quorum)
            nodes = await crawl.find()
        for node in crawl.unanswered:
            self._table.suspect(node)
        return nodes, crawl

    async def _get_key(self, key: bytes, whole: bool) -> tuple[list[VerifiedRecord], bool]:
        _, crawl = await self._look_up(Node(key), self._protocol.call_find_value, QUORUM)
        if whole:
            self._check_whole(crawl)
        replies = list(crawl.replies.values())
        # Most replicas answer the same bytes: check each once.
        data = {record for reply in replies for record in reply.records}
        records = self._store.get(key)
        for one in data.difference(self._store.get_encoded(key)):
            try:
                records.append(open_record(SignedRecord.decode(one), now=self._now(), key=key))
            except RemoteProtocolError as error:
                # Forged or just expired; the others are no worse for it.
                log.debug("skipped a record under %s: %s", key.hex(), error)
        is_split = any(reply.split for reply in replies) or self._store.is_split(key)
        return newest(records), is_split

    def _check_whole(self, crawl: Crawl[FindReply]) -> None:
        # Whoever cannot be dialled keeps no records.
        own = bool(self.addresses)
        answered, asked = len(crawl.replies) + own, crawl.asked + own
        lost = crawl.asked == 0 and not self._is_first
        if lost or answered < min(QUORUM, asked // 2 + 1):
            raise PartialView(f"{len(crawl.replies)} of {crawl.asked} peers answered")

    async def _put_key(self, key: bytes, data: list[bytes]) -> list[Counter[Outcome]]:
        """What became of each record at the peers that should hold `key`, which may include ourselves."""
        put = _Put(key, data)
        known = self._holders.of(key)
        if known:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._put_to, put, self._without_own_share(put, known))
                nursery.start_soon(self._put_to_newcomers, put, known)
            self._holders.renewed(key, put.took)
        if not self._holders.of(key):
            nodes, _ = await self._look_up(Node(key), self._protocol.call_find_node, count=REPLICAS)
            await self._put_to(put, self._without_own_share(put, nodes))
            self._holders.looked_up(key, put.took)
        return put.outcomes

    async def _put_to(self, put: _Put, nodes: Iterable[PeerNode]) -> None:
        async def put_to(node: PeerNode) -> None:
            put.answered(node, await self._protocol.call_store(node, put.key, put.data))

        async with trio.open_nursery() as nursery:
            for node in nodes:
                if node.id not in put.asked:
                    put.asked.add(node.id)
                    nursery.start_soon(put_to, node)

    async def _put_to_newcomers(self, put: _Put, known: list[PeerNode]) -> None:
        """Put it to whoever should hold the key by now as well, as far as we, or one of the holders, have heard."""
        target = Node(put.key)
        reply = await self._protocol.call_find_node(self._random.choice(known[:WITNESSES]), target)
        heard_of = [*self._table.find_neighbors(target, REPLICAS), *(reply.nodes if reply is not None else ())]
        others = [node for node in heard_of if node.id != self._own.id]
        await self._put_to(put, self._holders.newcomers(put.key, others))

    def _without_own_share(self, put: _Put, nodes: list[PeerNode]) -> list[PeerNode]:
        """The nearest others that should hold it, once it was put to ourselves if we should."""
        is_near = len(nodes) < REPLICAS or self._own.distance_to(Node(put.key)) < nodes[-1].distance_to(Node(put.key))
        if not self.addresses or not is_near:
            return nodes
        if self._own.id not in put.asked:
            put.asked.add(self._own.id)
            own = self._own.contact.peer_id
            put.count([self._store.put(put.key, one, storer=own) for one in put.data])
        return nodes[: REPLICAS - 1]

    async def _count_replicas(self, data: bytes, outcomes: Counter[Outcome], part: bytes | None) -> int:
        """How many peers have the record; if any had no place for it, put it under the key's part as well."""
        replicas = outcomes["stored"] + outcomes["known"]
        if outcomes["older"]:
            log.warning("%d peers hold a newer record than the one we announce", outcomes["older"])
        if outcomes["full"] and part is not None:
            (at_part,) = await self._put_key(part, [data])
            replicas = max(replicas, at_part["stored"] + at_part["known"])
        return replicas


class _Put:
    """Records on their way to the holders of one key: who was asked, who took them, and what became of each."""

    def __init__(self, key: bytes, data: list[bytes]) -> None:
        self.key = key
        self.data = data
        self.outcomes: list[Counter[Outcome]] = [Counter() for _ in data]
        self.asked: set[bytes] = set()
        self.took: list[PeerNode] = []

    def answered(self, node: PeerNode, outcomes: Sequence[Outcome]) -> None:
        """A peer said this of each record; nothing, if it did not answer."""
        if outcomes:
            self.took.append(node)
            self.count(outcomes)

    def count(self, outcomes: Iterable[Outcome]) -> None:
        for counter, outcome in zip(self.outcomes, outcomes, strict=True):
            counter[outcome] += 1

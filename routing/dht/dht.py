"""The DHT as the rest of peerd uses it: get and put sets of signed records, join, stay connected.

Joins lookup, table, store and protocol, and runs their requests. Any peer may be dead, out of date or lying. So
every record is checked here again, the answers of several peers are united, and replicas are counted by answers.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from random import Random

import trio
from kademlia.node import Node

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import SignedRecord, VerifiedRecord, open_record
from peerd.protocol.records.keys import MAX_SPLITS, keys_of, split_keys_of
from peerd.routing.dht.lookup import Crawl
from peerd.routing.dht.lost_contacts import MAX_LOST, LostContacts
from peerd.routing.dht.messages import (
    MAX_CONTACTS,
    MAX_STORED_AT_ONCE,
    SALT_BYTES,
    Packet,
    contact_addresses,
)
from peerd.routing.dht.newcomers import meet_each
from peerd.routing.dht.odd_times import OddTimes
from peerd.routing.dht.record_sets import PartialView, RecordKey, newest
from peerd.routing.dht.replication import Replication
from peerd.routing.dht.rpc import DhtProtocol, DhtTransport, FindReply
from peerd.routing.dht.set_reading import SetReader
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import Contact, PeerNode, dump_contacts

log = logging.getLogger(__name__)

# Concurrent requests of a lookup. With 30 % of 200 peers just dead, a median get took 0.21 s, against 0.36 s with
# Kademlia's 3, for 14 requests instead of 13.
ALPHA = 5
# How many answers a lookup of records waits for. Each record was put to the 12 nearest peers at most 20 s ago: of the 8
# that are nearest now, a peer lacks it only if it joined since.
QUORUM = 8
# Concurrent lookups; each has a few requests under way.
MAX_LOOKUPS = 16


class Dht:
    """One peer of the DHT. Start it with `bootstrap`, then call `refresh` once a minute.

    now: unix seconds, corrected (spec/discovery/records.md).
    random: chooses the ids that `refresh` looks up.
    addresses: where other peers can dial us. () makes us a client, which asks but is in no other peer's table.
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
        # Peers that no longer answered. After a partition, the other half is found through one of them.
        self._lost = LostContacts()
        self._protocol = DhtProtocol(self._own, store, transport, random, self._lost)
        self._table = self._protocol.router
        self._random = random
        self._replication = Replication(self._own, store, self._protocol, self._nearest, random)
        # The peers to start from if the table is empty: the argument of `bootstrap`, and the peers that we knew a while
        # ago.
        self._seeds: list[PeerNode] = []
        self._last_known: list[PeerNode] = []
        # True as long as no peer was ever known: then we may be the first peer of a swarm.
        self._is_first = True
        self._lookups = trio.Semaphore(MAX_LOOKUPS)
        #: Servers whose records could not be used because of a clock.
        self.odd_times = OddTimes()

    def __repr__(self) -> str:
        role = "server" if self.addresses else "client"
        return f"<Dht {role} {self._own.contact.peer_id}: {len(self._table)} contacts, {len(self._store)} records>"

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        """Where other peers are told to dial us; changes as we learn whether we can be reached."""
        return self._protocol.addresses

    @addresses.setter
    def addresses(self, addresses: Sequence[Multiaddr]) -> None:
        self._protocol.addresses = contact_addresses(addresses)

    @property
    def contacts(self) -> list[Contact]:
        """The peers in our routing table."""
        return [node.contact for node in self._table]

    def dump(self) -> str:
        """The routing table as text, followed by the lost peers. After a restart, pass `load_contacts(text)` to
        `bootstrap`.
        """
        known = self.contacts
        return dump_contacts([*known, *self._lost.contacts][: max(len(known), MAX_LOST)])

    async def bootstrap(self, contacts: Iterable[Contact]) -> int:
        """Join through any of these contacts. Returns how many peers we know then; 0 means that none answered."""
        self._seeds = [PeerNode(contact) for contact in contacts if contact.peer_id != self._own.contact.peer_id]
        return await self._join()

    async def meet(self, contact: Contact) -> bool:
        """Get to know a peer, and through it those that are nearest to us. Returns whether it answered."""
        node = PeerNode(contact)
        await self._look_up(Node(self._own.id), self._protocol.call_find_node, start=[node])
        return any(known.id == node.id for known in self._table)

    async def introduce(self) -> None:
        """Send a question to the peers nearest to us and to all known peers, so that they learn our changed
        addresses.
        """
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
        """Ping the peers in doubt, look up ids in ranges that were idle for an hour, join again if no peers are
        left.
        """
        async with trio.open_nursery() as nursery:
            for node in self._table.take_suspects():
                nursery.start_soon(self._protocol.call_ping, node)
        if len(self._table):
            self._last_known = list(self._table)
        else:
            # Our own network failed, which is more likely than that all peers failed at once.
            await self._join()
        await self._look_up_all(self._protocol.get_refresh_ids())

    async def meet_newcomers(self) -> None:
        """Look for newcomers at the addresses that they name, until cancelled. Only peers that were found there are
        passed on.
        """
        await meet_each(self._protocol.newcomers, self._protocol.meet)

    async def reunite(self) -> bool:
        """Ask a lost peer, or a bootstrap peer, for the contacts nearest to us.

        Even a full table may contain only one half of a swarm that was split, which no peer of that half notices. If
        the answer names peers that we do not know, we join through them. Returns whether it did.
        """
        candidates = [*self._random.sample(self._seeds, min(1, len(self._seeds))), *self._lost.sample(self._random, 2)]
        asked = [node for node in candidates if node not in self._table]
        replies = [await self._protocol.call_find_node(node, Node(self._own.id)) for node in asked]
        found = [node for node, reply in zip(asked, replies, strict=True) if reply is not None]
        named = [named for reply in replies if reply is not None for named in reply.nodes]
        strangers = [node for node in named if node.id != self._own.id and node not in self._table]
        if not found or not strangers:
            return False
        log.info("found %d peers of another part of the swarm", len(strangers))
        for key in (self._own.id, *self._protocol.get_refresh_ids(self._table.buckets)):
            await self._look_up(Node(key), self._protocol.call_find_node, start=[*found, *strangers])
        return True

    async def get(self, wanted: RecordKey, *, whole: bool = False) -> list[VerifiedRecord]:
        """The valid records of the set, the newest of each slot, from a quorum of the peers nearest to its key.

        whole: raise PartialView unless a quorum of peers answered, or most of those that were asked (including
        ourselves, if we store records).
        """
        records, is_split = await self._get_key(wanted.key, whole)
        if is_split and wanted.parts:

            async def add_part(part: RecordKey) -> None:
                records.extend(await self.get(part, whole=whole))

            async with trio.open_nursery() as nursery:
                for part in wanted.parts:
                    nursery.start_soon(add_part, part)
        return newest(records)

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        """`get` for several sets at once; the results are in the order of `wanted`."""
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
        """Store each record with the peers nearest to each of its keys, or to the key's part if the key is full.

        Returns how many peers hold the record, for the record and key with the fewest. Raises RemoteProtocolError
        for a record that no peer would accept.
        """
        parts: dict[bytes, dict[bytes, list[bytes]]] = defaultdict(dict)
        for signed in records:
            record = open_record(signed, now=self._now())
            keys = keys_of(record.body, record.peer_id)
            by_depth = [split_keys_of(record.body, record.peer_id, depth) for depth in range(1, MAX_SPLITS + 1)]
            for index, key in enumerate(keys):
                parts[key][signed.encode()] = [part_keys[index] for part_keys in by_depth if part_keys]
        counts: list[int] = []

        async def put_all(key: bytes, parts_of: dict[bytes, list[bytes]]) -> None:
            data = list(parts_of)
            for at in range(0, len(data), MAX_STORED_AT_ONCE):
                batch = data[at : at + MAX_STORED_AT_ONCE]
                for one, outcomes in zip(batch, await self._replication.put(key, batch), strict=True):
                    counts.append(await self._replication.count_replicas(one, outcomes, parts_of[one]))

        async with trio.open_nursery() as nursery:
            for key, parts_of in parts.items():
                nursery.start_soon(put_all, key, parts_of)
        return min(counts, default=0)

    async def handle(self, sender: PeerId, packet: Packet, source: IPv4Address | IPv6Address | None = None) -> Packet:
        """Answer a peer. `sender` is the PeerId that its connection proved, `source` the address at which we see it.

        Raises InvalidRequest.
        """
        await trio.lowlevel.checkpoint()
        return self._protocol.answer(sender, packet, source)

    async def _join(self) -> int:
        await self._look_up(Node(self._own.id), self._protocol.call_find_node)
        # Kademlia paper, 2.3: look up ids in the farther ranges too, since each of them has a bucket to fill.
        await self._look_up_all(self._protocol.get_refresh_ids(self._table.buckets))
        return len(self._table)

    async def _look_up_all(self, ids: Sequence[bytes]) -> None:
        async with trio.open_nursery() as nursery:
            for key in ids:
                nursery.start_soon(self._look_up, Node(key), self._protocol.call_find_node)

    async def _nearest(self, target: Node, count: int) -> list[PeerNode]:
        nodes, _ = await self._look_up(target, self._protocol.call_find_node, count=count)
        return nodes

    async def _look_up(
        self,
        target: Node,
        ask: Callable[[PeerNode, Node], Awaitable[FindReply | None]],
        quorum: int | None = None,
        count: int = MAX_CONTACTS,
        start: Sequence[PeerNode] = (),
    ) -> tuple[list[PeerNode], Crawl[FindReply]]:
        """The nearest peers that answered, nearest first, and the lookup with all answers."""
        async with self._lookups:
            self._table.touch(target)
            known = self._table.find_neighbors(target) or [*self._seeds, *self._last_known]
            self._is_first &= not known
            crawl: Crawl[FindReply] = Crawl(
                self._own, target, [*known, *start], ask, ksize=count, alpha=ALPHA, quorum=quorum, lost=self._lost
            )
            nodes = await crawl.find()
        for node in crawl.unanswered:
            self._table.suspect(node)
        return nodes, crawl

    async def _get_key(self, key: bytes, whole: bool) -> tuple[list[VerifiedRecord], bool]:
        reader = SetReader(self._protocol, self._random.randbytes(SALT_BYTES))
        _, crawl = await self._look_up(Node(key), reader.ask, QUORUM)
        replies = list(crawl.replies.values())
        # Most replicas answer the same bytes; check each record once.
        data = await reader.complete(Node(key), self._store.get_encoded(key))
        if whole:
            self._check_whole(crawl, len(reader.unsent))
        records = self._store.get(key)
        refused = []
        for one in data.difference(self._store.get_encoded(key)):
            try:
                records.append(open_record(SignedRecord.decode(one), now=self._now(), key=key))
            except RemoteProtocolError as error:
                # Forged or just expired; the other records still count.
                log.debug("skipped a record under %s: %s", key.hex(), error)
                refused.append(one)
        self.odd_times.note(refused, key, self._now())
        # Parts are sixteen lookups more: one peer alone does not make us do them.
        split = sum(reply.split for reply in replies)
        is_split = split >= min(2, len(replies)) > 0 or self._store.is_split(key)
        return newest(records), is_split

    def _check_whole(self, crawl: Crawl[FindReply], unsent: int) -> None:
        """Raise PartialView if too few peers answered, of which `unsent` kept back what they have."""
        # Count ourselves as an answer only if we store records.
        own = bool(self.addresses)
        whole = len(crawl.replies) - unsent
        answered, asked = whole + own, crawl.asked + own
        lost = crawl.asked == 0 and not self._is_first
        if lost or answered < min(QUORUM, asked // 2 + 1):
            raise PartialView(f"{whole} of {crawl.asked} peers answered")

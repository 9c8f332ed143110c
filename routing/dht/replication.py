"""Puts records to the peers that should hold a key, and counts how many do.

A key's holders change as peers come and go. A renewal asks only for newcomers, and a lookup finds the holders anew when
one is due (`holders`). If peers refuse a record as full, it goes under the key's part as well (spec/discovery/dht.md).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from random import Random

import trio
from kademlia.node import Node

from peerd.routing.dht.holders import Holders
from peerd.routing.dht.messages import REPLICAS, Outcome
from peerd.routing.dht.rpc import DhtProtocol
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import PeerNode

log = logging.getLogger(__name__)

# A renewal asks one of this many nearest peers for newcomers, chosen at random, because the very nearest may lie.
WITNESSES = 4

LookUp = Callable[[Node, int], Awaitable[list[PeerNode]]]
"""Finds the nearest peers to a key that answer: at most so many."""


class Replication:
    """The records that one peer announces, on their way to the holders of their keys."""

    def __init__(
        self, own: PeerNode, store: RecordStore, protocol: DhtProtocol, look_up: LookUp, random: Random
    ) -> None:
        self._own = own
        self._store = store
        self._protocol = protocol
        self._table = protocol.router
        self._look_up = look_up
        self._random = random
        self._holders = Holders(REPLICAS, trio.current_time)

    async def put(self, key: bytes, data: list[bytes]) -> list[Counter[Outcome]]:
        """The outcomes of each record at the peers that should hold `key`, which may include ourselves."""
        under_way = _Put(key, data)
        known = self._holders.of(key)
        if known:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._put_to, under_way, self._without_own_share(under_way, known))
                nursery.start_soon(self._put_to_newcomers, under_way, known)
            self._holders.renewed(key, under_way.took)
        if not self._holders.of(key):
            nodes = await self._look_up(Node(key), REPLICAS)
            await self._put_to(under_way, self._without_own_share(under_way, nodes))
            self._holders.looked_up(key, under_way.took)
        return under_way.outcomes

    async def _put_to(self, put: _Put, nodes: Iterable[PeerNode]) -> None:
        async def put_to(node: PeerNode) -> None:
            put.answered(node, await self._protocol.call_store(node, put.key, put.data))

        async with trio.open_nursery() as nursery:
            for node in nodes:
                if node.id not in put.asked:
                    put.asked.add(node.id)
                    nursery.start_soon(put_to, node)

    async def _put_to_newcomers(self, put: _Put, known: list[PeerNode]) -> None:
        """Put the records to peers that should hold the key by now as well, as far as we or one of the holders know
        them.
        """
        target = Node(put.key)
        reply = await self._protocol.call_find_node(self._random.choice(known[:WITNESSES]), target)
        heard_of = [*self._table.find_neighbors(target, REPLICAS), *(reply.nodes if reply is not None else ())]
        others = [node for node in heard_of if node.id != self._own.id]
        await self._put_to(put, self._holders.newcomers(put.key, others))

    def _without_own_share(self, put: _Put, nodes: list[PeerNode]) -> list[PeerNode]:
        """The nearest other peers that should hold the key. If we should hold it too, the records are stored here
        first.
        """
        is_near = len(nodes) < REPLICAS or self._own.distance_to(Node(put.key)) < nodes[-1].distance_to(Node(put.key))
        if not self._protocol.addresses or not is_near:
            return nodes
        if self._own.id not in put.asked:
            put.asked.add(self._own.id)
            own = self._own.contact.peer_id
            put.count([self._store.put(put.key, one, storer=own) for one in put.data])
        return nodes[: REPLICAS - 1]

    async def count_replicas(self, data: bytes, outcomes: Counter[Outcome], parts: list[bytes]) -> int:
        """How many peers hold the record. If some refused it as full, it is put under the key's part as well.

        parts: the keys of the parts, each of the one before it.
        """
        replicas = outcomes["stored"] + outcomes["known"]
        if outcomes["older"]:
            log.warning("%d peers hold a newer record than the one we announce", outcomes["older"])
        if outcomes["full"] and parts:
            (at_part,) = await self.put(parts[0], [data])
            replicas = max(replicas, await self.count_replicas(data, at_part, parts[1:]))
        return replicas


class _Put:
    """Records on their way to the holders of one key: which peers were asked, which accepted, and each outcome."""

    def __init__(self, key: bytes, data: list[bytes]) -> None:
        self.key = key
        self.data = data
        self.outcomes: list[Counter[Outcome]] = [Counter() for _ in data]
        self.asked: set[bytes] = set()
        self.took: list[PeerNode] = []

    def answered(self, node: PeerNode, outcomes: Sequence[Outcome]) -> None:
        """Note a peer's outcomes, one for each record; empty if it did not answer."""
        if outcomes:
            self.took.append(node)
            self.count(outcomes)

    def count(self, outcomes: Iterable[Outcome]) -> None:
        for counter, outcome in zip(self.outcomes, outcomes, strict=True):
            counter[outcome] += 1

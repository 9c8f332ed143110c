"""Iterative lookup: finds the peers nearest to a key, and collects their answers.

Peers that have just died each cost a whole request deadline, so the lookup must not wait for them. Requests slide
over one heap of candidates instead of going in rounds, a slow request gives its place to another, and a lookup that
needs only a quorum stops when no unasked peer could be nearer (spec/discovery/dht.md).
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

import trio
from kademlia.crawling import SpiderCrawl
from kademlia.node import Node, NodeHeap

from peerd.routing.dht.diversity import spread
from peerd.routing.dht.table import PeerNode

# Most answers take one round trip, mostly below 0.2 s. A request that takes longer no longer counts as busy.
PATIENCE_S = 0.2
# A new connection takes about four round trips. A lookup that has some answers waits no longer than this for the rest.
GIVE_UP_S = 1.0


_OWN_TABLE = "our own table"


class Reply(Protocol):
    """The part of an answer that a lookup needs: the peers that it names."""

    @property
    def nodes(self) -> list[PeerNode]: ...


R = TypeVar("R", bound=Reply)


class Shortlist(NodeHeap):  # type: ignore[misc]  # kademlia publishes no types
    """A NodeHeap in which a peer that failed stays out, however often other peers name it.

    It returns the nearest nodes, at most two of one network as long as there are others. Its heap is kept sorted,
    because it is read many times for each time that it grows.
    """

    heap: list[tuple[int, PeerNode]]

    def __init__(self, node: Node, maxsize: int) -> None:
        super().__init__(node, maxsize)
        self._known: set[bytes] = set()
        self._shown: list[PeerNode] | None = None

    def __contains__(self, node: Node) -> bool:
        # The library searches the heap, which takes most of a lookup's time, and forgets peers that failed.
        return node.id in self._known

    def __iter__(self) -> Iterator[PeerNode]:
        if self._shown is None:
            self._shown = spread((node for _, node in self.heap), self.maxsize)
        return iter(self._shown)

    def changed(self) -> None:
        """Note that something about a peer has changed, such as its network."""
        self._shown = None

    def remove(self, peers: Iterable[bytes]) -> None:
        self._shown = None
        gone = set(peers)
        self.heap = [entry for entry in self.heap if entry[1].id not in gone]

    def push(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node not in self:
                self._known.add(node.id)
                self._shown = None
                insort(self.heap, (self.node.distance_to(node), node))


class Crawl(SpiderCrawl, Generic[R]):  # type: ignore[misc]  # kademlia publishes no types
    """One lookup of one key, starting from the known `peers`. Use once: `await crawl.find()`.

    own: our own node, which other peers will name and which is not asked.
    ask: sends the request to a peer; returns None if it failed or did not answer in time.
    quorum: stop when this many of the nearest have answered; None waits for all `ksize` of them.
    lost: the ids of peers that answered us once and do not any more. If another peer names one, it counts as asked.
    """

    def __init__(
        self,
        own: Node,
        target: Node,
        peers: list[PeerNode],
        ask: Callable[[PeerNode, Node], Awaitable[R | None]],
        *,
        ksize: int,
        alpha: int,
        quorum: int | None = None,
        lost: Container[bytes] = (),
    ) -> None:
        super().__init__(None, target, [], ksize, alpha)
        self.nearest = Shortlist(target, ksize)
        self.nearest.push([own])
        self.nearest.remove([own.id])
        self.nearest.push(peers)
        # Which peers named each peer; our own table names those that once answered us.
        self._named_by: dict[bytes, set[str]] = {node.id: {_OWN_TABLE} for node in peers}
        self.replies: dict[bytes, R] = {}
        self._ask = ask
        self._quorum = quorum
        self._lost = lost
        self._asked_at: dict[bytes, float] = {}
        self._answered = trio.Event()

    async def find(self) -> list[PeerNode]:
        """Ask until the nearest peers have answered. Returns them, nearest first; `replies` has their answers."""
        await self._find(self._ask)
        return [node for node in self.nearest if node.id in self.replies]

    @property
    def asked(self) -> int:
        """How many peers were asked, counting only those that answered, that we knew, or that two peers named that have
        no network in common. A peer named by one other peer alone may be made up.
        """
        return sum(node_id in self.replies or self._is_credible(node_id) for node_id in self.nearest.contacted)

    def _is_credible(self, node_id: bytes) -> bool:
        named_by = self._named_by.get(node_id, set())
        return _OWN_TABLE in named_by or len(named_by) >= 2 or node_id in self._lost

    @property
    def unanswered(self) -> list[PeerNode]:
        """The peers that had not answered when the lookup ended, though they had time to."""
        now = trio.current_time()
        return [n for n in self.nearest if n.id in self._asked_at and now >= self._asked_at[n.id] + PATIENCE_S]

    async def _find(self, rpcmethod: Callable[[PeerNode, Node], Awaitable[R | None]]) -> None:
        # Replaces the library's rounds, which use asyncio and wait for the slowest peer of each round.
        async with trio.open_nursery() as nursery:
            while not self._is_done():
                self._answered = trio.Event()
                for node in self._to_ask_now():
                    self.nearest.mark_contacted(node)
                    self._asked_at[node.id] = trio.current_time()
                    nursery.start_soon(self._ask_one, rpcmethod, node)
                with trio.move_on_at(self._next_deadline()):
                    await self._answered.wait()
            nursery.cancel_scope.cancel()

    async def _ask_one(self, rpcmethod: Callable[[PeerNode, Node], Awaitable[R | None]], node: PeerNode) -> None:
        reply = await rpcmethod(node, self.node)
        del self._asked_at[node.id]
        if reply is None:
            self.nearest.remove([node.id])
        else:
            self.replies[node.id] = reply
            for named in reply.nodes:
                self._named_by.setdefault(named.id, set()).add(node.network or node.contact.peer_id)
            self.nearest.push(reply.nodes)
            self.nearest.changed()
        self._answered.set()

    def _to_ask_now(self) -> list[PeerNode]:
        """The nearest unasked peers, as many as there are free askers. A request that is overdue does not occupy
        one.
        """
        busy = sum(not passed for passed in self._have_waited(PATIENCE_S))
        unasked: list[PeerNode] = self.nearest.get_uncontacted()
        return unasked[: max(0, self.alpha - busy)]

    def _have_waited(self, seconds: float) -> list[bool]:
        """For each unanswered request, whether it is that old."""
        now = trio.current_time()
        return [now >= asked_at + seconds for asked_at in self._asked_at.values()]

    def _next_deadline(self) -> float:
        """The next time at which an asker becomes free or the lookup may end, if no answer comes before."""
        limits = (asked_at + limit for asked_at in self._asked_at.values() for limit in (PATIENCE_S, GIVE_UP_S))
        return min((when for when in limits if when > trio.current_time()), default=math.inf)

    def _is_done(self) -> bool:
        if self._quorum is None:
            return all(node.id in self.replies for node in self.nearest)
        answered = 0
        for node in self.nearest:
            if node.id in self.replies:
                answered += 1
                if answered == self._quorum:
                    return True
            elif node.id not in self.nearest.contacted:
                return False
        # There are fewer peers than the quorum, and all were asked.
        return not self._asked_at or (answered > 0 and all(self._have_waited(GIVE_UP_S)))

"""Iterative lookup: which peers are nearest to a key, and what each of them answers.

Knows distances and replies; knows no sockets and no records. The difficulty lies in peers that died a
moment ago: each costs a whole request deadline, so nothing may wait for one that need not. Askers slide
over one heap of candidates instead of going in rounds, one that is slow gives its place to another, and
a lookup that needs only a quorum stops when nobody left unasked could be nearer (spec/dht.md).
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

import trio
from kademlia.crawling import SpiderCrawl
from kademlia.node import Node, NodeHeap

from peerd.routing.dht.table import PeerNode

# Most answers take one round trip, and most of those less than 0.2 s. Who takes longer holds up no asker.
PATIENCE_S = 0.2
# A new connection takes about four round trips. A lookup that has some answers waits no longer for the last.
GIVE_UP_S = 1.0


class Reply(Protocol):
    """What a lookup needs of an answer: the peers that it names."""

    @property
    def nodes(self) -> list[PeerNode]: ...


R = TypeVar("R", bound=Reply)


class Candidates(NodeHeap):  # type: ignore[misc]  # kademlia publishes no types
    """A NodeHeap in which a peer that failed stays out, however often others name it.

    Its heap is kept in order: it is read many times for each time that it grows.
    """

    heap: list[tuple[int, PeerNode]]

    def __init__(self, node: Node, maxsize: int) -> None:
        super().__init__(node, maxsize)
        self._known: set[bytes] = set()

    def __contains__(self, node: Node) -> bool:
        # The library searches the heap, which takes most of a lookup's time; and it forgets who failed.
        return node.id in self._known

    def __iter__(self) -> Iterator[PeerNode]:
        return iter([node for _, node in self.heap[: self.maxsize]])

    def remove(self, peers: Iterable[bytes]) -> None:
        gone = set(peers)
        self.heap = [entry for entry in self.heap if entry[1].id not in gone]

    def push(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node not in self:
                self._known.add(node.id)
                insort(self.heap, (self.node.distance_to(node), node))


class Crawl(SpiderCrawl, Generic[R]):  # type: ignore[misc]  # kademlia publishes no types
    """One lookup of one key, from the `peers` we know. Use once: `await crawl.find()`.

    own: our own node, which others will name and nobody needs to ask.
    ask: sends the request to a peer; returns None where it failed or did not answer in time.
    quorum: be content with the answers of this many of the nearest; None waits for all `ksize` of them.
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
    ) -> None:
        super().__init__(None, target, [], ksize, alpha)
        self.nearest = Candidates(target, ksize)
        self.nearest.push([own])
        self.nearest.remove([own.id])
        self.nearest.push(peers)
        self.replies: dict[bytes, R] = {}
        self._ask = ask
        self._quorum = quorum
        self._asked_at: dict[bytes, float] = {}
        self._answered = trio.Event()

    async def find(self) -> list[PeerNode]:
        """Ask until the nearest have answered. Returns those, nearest first; `replies` has what they said."""
        await self._find(self._ask)
        return [node for node in self.nearest if node.id in self.replies]

    @property
    def asked(self) -> int:
        """How many peers were asked."""
        return len(self.nearest.contacted)

    @property
    def unanswered(self) -> list[PeerNode]:
        """The peers that had not answered when the lookup ended, though they had the time for it."""
        now = trio.current_time()
        return [n for n in self.nearest if n.id in self._asked_at and now >= self._asked_at[n.id] + PATIENCE_S]

    async def _find(self, rpcmethod: Callable[[PeerNode, Node], Awaitable[R | None]]) -> None:
        # Instead of the library's rounds, which go through asyncio and wait for the slowest of each.
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
            self.nearest.push(reply.nodes)
        self._answered.set()

    def _to_ask_now(self) -> list[PeerNode]:
        """The nearest unasked, as many as there are free askers; who waits for an overdue answer counts as free."""
        busy = sum(not passed for passed in self._have_waited(PATIENCE_S))
        unasked: list[PeerNode] = self.nearest.get_uncontacted()
        return unasked[: max(0, self.alpha - busy)]

    def _have_waited(self, seconds: float) -> list[bool]:
        """For each unanswered request, whether it is that old."""
        now = trio.current_time()
        return [now >= asked_at + seconds for asked_at in self._asked_at.values()]

    def _next_deadline(self) -> float:
        """When an asker becomes free, or the lookup may end, without another answer."""
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
        # Fewer peers than the quorum, and all were asked.
        return not self._asked_at or (answered > 0 and all(self._have_waited(GIVE_UP_S)))

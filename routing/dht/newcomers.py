"""Peers that named addresses at which they have not been dialled yet.

What a stranger says about addresses is not passed on, because they could be other peers' addresses. A few such peers
wait here until the transport has found them at one of their addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable

import trio

from peerd.routing.dht.table import PeerNode

# When more peers come, the oldest is dropped. It comes again with its next question.
MAX_WAITING = 64
# How many newcomers are looked for at a time, and the pause between two. So strangers can cause only a few dials a
# second.
MEETINGS = 8
MEETING_PAUSE_S = 0.1


class Newcomers:
    """A bounded queue with one place for each peer; the oldest makes room."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, PeerNode] = OrderedDict()
        self._came = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Newcomers {len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, node: PeerNode) -> None:
        """Add a peer to look for, with the addresses that it names now."""
        self._waiting.pop(node.id, None)
        self._waiting[node.id] = node
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        self._came.unpark_all()

    async def take(self) -> PeerNode:
        """The next peer to look for, once there is one."""
        while not self._waiting:
            await self._came.park()
        return self._waiting.popitem(last=False)[1]


async def meet_each(newcomers: Newcomers, meet: Callable[[PeerNode], Awaitable[object]]) -> None:
    """Look for newcomers at the addresses that they name, a few at a time, until cancelled."""
    # A peer may come twice at a time, so meetings are counted and not given to peers.
    room = trio.Semaphore(MEETINGS)

    async def meet_one(node: PeerNode) -> None:
        try:
            await meet(node)
        finally:
            room.release()

    async with trio.open_nursery() as nursery:
        while True:
            node = await newcomers.take()
            await room.acquire()
            nursery.start_soon(meet_one, node)
            await trio.sleep(MEETING_PAUSE_S)

"""Peers that said where they can be dialled, and have not been dialled there yet.

Nothing is passed on of what a stranger says of addresses: anybody's could be among them. They wait here, a few, until
the transport has found the peer at one of them.
"""

from __future__ import annotations

from collections import OrderedDict

import trio

from peerd.routing.dht.table import PeerNode

# More wait for nothing: they come again with their next question.
MAX_WAITING = 64


class Newcomers:
    """A bounded queue, one place a peer; the oldest makes room."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, PeerNode] = OrderedDict()
        self._came = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Newcomers {len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, node: PeerNode) -> None:
        """Somebody to look for; what it says now replaces what it said."""
        self._waiting.pop(node.id, None)
        self._waiting[node.id] = node
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        self._came.unpark_all()

    async def take(self) -> PeerNode:
        """The next to look for, once there is one."""
        while not self._waiting:
            await self._came.park()
        return self._waiting.popitem(last=False)[1]

"""Checks, by dialling, that the blocks which a server is about to give up have another server.

Anybody can announce servers that are not there. If a server left its blocks to those, the blocks would have no server
at all. So only servers count that we reach ourselves. If there are too many to dial, some that we reached before are
dialled first; in doubt the server stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Protocol

import trio

from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.directory.holding import Holding
from peerd.routing.placement.placement import as_announced

# How many servers are dialled for one move, and how many at a time.
MAX_DIALLED = 32
AT_ONCE = 8


class Reaching(Protocol):
    """Knows which peers we reach: `Discovery`."""

    async def reaches(self, peer_id: PeerId) -> bool:
        """Whether the peer answers us now, in a bounded time."""

    def is_absent(self, peer_id: PeerId) -> bool:
        """Whether we tried to reach the peer lately and never found it."""

    def is_reached(self, peer_id: PeerId) -> bool:
        """Whether we reached the peer before."""


def present(holdings: Iterable[Holding], reaching: Reaching) -> list[Holding]:
    """The holdings without those of peers that we looked for in vain."""
    return [one for one in holdings if not reaching.is_absent(one.peer_id)]


async def is_left_covered(
    holdings: Sequence[Holding], own: PeerId, span: Span, reaching: Reaching, random: Random
) -> bool:
    """Whether other servers that we reach serve every block of `span`, and do not mean to leave it."""
    others = [
        one
        for one in as_announced(holdings)
        if one.peer_id != own and one.record.state == "online" and _overlap(one.record.span, span)
    ]
    peers = sorted({one.peer_id for one in others})
    random.shuffle(peers)
    reached: set[PeerId] = set()
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def reach(peer_id: PeerId) -> None:
        async with limiter:
            if await reaching.reaches(peer_id):
                reached.add(peer_id)

    async with trio.open_nursery() as nursery:
        for peer_id in _to_dial(peers, reaching):
            nursery.start_soon(reach, peer_id)
    held = {
        block for one in others if one.peer_id in reached for block in range(one.record.span.start, one.record.span.end)
    }
    return held.issuperset(range(span.start, span.end))


def _to_dial(peers: Sequence[PeerId], reaching: Reaching) -> list[PeerId]:
    """At most MAX_DIALLED of `peers`. If there are more, half are such that we reached before: strangers may have
    made up all others.
    """
    known = [peer_id for peer_id in peers if reaching.is_reached(peer_id)]
    new = sorted(set(peers).difference(known), key=lambda peer_id: (reaching.is_absent(peer_id), peers.index(peer_id)))
    of_new = min(len(new), max(MAX_DIALLED // 2, MAX_DIALLED - len(known)))
    return known[: MAX_DIALLED - of_new] + new[:of_new]


def _overlap(one: Span, other: Span) -> bool:
    return max(one.start, other.start) < min(one.end, other.end)

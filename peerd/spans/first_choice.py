"""Chooses a server's first span, in agreement with the other servers that start at the same time.

`routing/placement` computes which span is best; here is the protocol around it. When a whole swarm starts at once,
every server sees an empty swarm, and all would take the first blocks. So each server announces the span that it intends
to take, before it takes it, and then looks again. If others are choosing too, it waits until all have seen all
intentions; then each computes the same assignment by itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from random import Random
from typing import Protocol

import trio

from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.dht.record_sets import PartialView
from peerd.routing.directory.holding import Holding, HoldingSource
from peerd.routing.placement.placement import Newcomer, are_choosing, choose_first_span
from peerd.spans.covered import Reaching, present
from peerd.spans.slots import Slot

log = logging.getLogger(__name__)

# The time for one announcement. If it cannot be made in this time, there is no swarm to agree with.
ANNOUNCE_S = 10.0
# The time for others to look and for their announcements to reach the records that we read: a second or two each. It is
# random, so that two servers that look at the same time do not do so for ever.
HESITATION_S = (2.0, 6.0)
# A server that still sees changes after this many looks loads its last choice: it can move later.
MAX_LOOKS = 8
# The wait between attempts to see the whole swarm.
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 30.0


class Announcing(Reaching, Protocol):
    """Announces what we serve, and shows what others serve and whether we reach them: `Discovery`."""

    @property
    def directory(self) -> HoldingSource: ...

    def announce_soon(self) -> None: ...

    async def wait_announced(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """The wanted span: of which model, how many blocks, and which blocks are `on_disk`."""

    model: bytes
    block_count: int
    size: int
    on_disk: frozenset[int]


async def choose_first(choice: Choice, slot: Slot, discovery: Announcing, peer_id: PeerId, random: Random) -> Span:
    """Choose the span to begin with. In the end `slot` intends it; the caller then decides on it and loads it.

    Waits until the whole swarm can be seen, however long that takes.
    """
    newcomer = Newcomer(peer_id, slot.number)
    has_waited = False
    for _ in range(MAX_LOOKS):
        holdings = await _see(choice, discovery, random)
        span = choose_first_span(holdings, newcomer, choice.block_count, choice.size, choice.on_disk)
        if span != slot.intended:
            slot.intended, has_waited = span, False
            await announce(discovery)
        elif has_waited or not are_choosing(holdings, peer_id):
            break
        else:
            await trio.sleep(random.uniform(*HESITATION_S))
            has_waited = True
    return span


async def announce(discovery: Announcing) -> None:
    """Announce a change, and wait until it is stored where others look, or for ANNOUNCE_S."""
    discovery.announce_soon()
    with trio.move_on_after(ANNOUNCE_S):
        await discovery.wait_announced()


async def _see(choice: Choice, discovery: Announcing, random: Random) -> list[Holding]:
    """All servers and intentions; waits until the whole swarm can be seen."""
    retry_s = FIRST_RETRY_S
    while True:
        try:
            return present(await discovery.directory.holdings(choice.model, choice.block_count), discovery)
        except PartialView as error:
            if retry_s == FIRST_RETRY_S:
                log.warning("waiting to see the whole swarm before choosing which blocks to serve: %s", error)
        await trio.sleep(retry_s * random.uniform(0.8, 1.2))
        retry_s = min(2 * retry_s, MAX_RETRY_S)

"""Chooses the span that a server begins with, together with all who start at the same time.

Knows the order in which to look, to say and to look again; which span it is `routing.placement` says. The difficulty is
a swarm that starts all at once: whoever looks sees nobody, and each would take the first blocks. So everybody says
what it means to take before it takes it, and looks again; who sees others choose waits a moment, until all have
seen all, and then each works out alone who goes where.
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
from peerd.spans.slots import Place

log = logging.getLogger(__name__)

# For saying something: without a swarm that takes it there is nobody to agree with.
ANNOUNCE_S = 10.0
# What others need to look, and for what they say to be where we look: a second or two each. At random, so that who
# looks at the same time does not do so for ever.
HESITATION_S = (2.0, 6.0)
# Who still hears something new after so many looks loads what it last chose: it can move later.
MAX_LOOKS = 8
# Between attempts to see the whole swarm.
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 30.0


class Announcing(Protocol):
    """Tells the swarm what we serve, and us what others do: `Discovery`."""

    @property
    def directory(self) -> HoldingSource: ...

    def changed(self) -> None: ...

    async def announced(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What is known of the span that is wanted: of which model, how many blocks, and which of them are `on_disk`."""

    model: bytes
    block_count: int
    size: int
    on_disk: frozenset[int]


async def choose_first(choice: Choice, place: Place, discovery: Announcing, peer_id: PeerId, random: Random) -> Span:
    """The span to begin with. `place` intends it in the end; whoever loads it then decides on it.

    Waits until the whole swarm can be seen, however long that takes.
    """
    newcomer = Newcomer(peer_id, place.slot)
    has_waited = False
    for _ in range(MAX_LOOKS):
        holdings = await _see(choice, discovery, random)
        span = choose_first_span(holdings, newcomer, choice.block_count, choice.size, choice.on_disk)
        if span != place.intended:
            place.intended, has_waited = span, False
            await announce(discovery)
        elif has_waited or not are_choosing(holdings, peer_id):
            break
        else:
            await trio.sleep(random.uniform(*HESITATION_S))
            has_waited = True
    return span


async def announce(discovery: Announcing) -> None:
    """Have what changed where others look, unless nobody takes it."""
    discovery.changed()
    with trio.move_on_after(ANNOUNCE_S):
        await discovery.announced()


async def _see(choice: Choice, discovery: Announcing, random: Random) -> list[Holding]:
    """The whole swarm."""
    retry_s = FIRST_RETRY_S
    while True:
        try:
            return await discovery.directory.holdings(choice.model, choice.block_count)
        except PartialView as error:
            if retry_s == FIRST_RETRY_S:
                log.warning("waiting to see the whole swarm before choosing which blocks to serve: %s", error)
        await trio.sleep(retry_s * random.uniform(0.8, 1.2))
        retry_s = min(2 * retry_s, MAX_RETRY_S)

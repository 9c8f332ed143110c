"""The lanes along a chain for one client's training passes: finds, opens and replaces them.

A client has the input of every hop. So a lane that fails costs only the requests on it: another peer, or several, take
its blocks. Hops are only ever split into smaller ones, so a request at a border between hops always finds a lane that
begins there.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from functools import partial

import trio

from peerd.client.finding.candidates import (
    MAX_FAULTS_WITHOUT_ANSWER,
    TRAINING_RULES,
    AskAgain,
    Candidates,
    GiveUp,
    Search,
    WaitUntil,
)
from peerd.client.finding.finder import ChainFinder, Patience
from peerd.client.finding.refusals import Refusals
from peerd.client.finding.served_by import ServedBy
from peerd.client.finding.voice import voice_of
from peerd.client.training.lane import LaneTerms, TrainingLane, open_lane
from peerd.net.connections import Connections
from peerd.protocol.errors import (
    BadResult,
    NoChain,
    Overloaded,
    PeerdError,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import AdapterNeed
from peerd.routing.chains.chain import Chain, Hop
from peerd.trio_tools import at_once

FORWARD, BACKWARD = "forward", "backward"
# A training pass needs no KV.
_NO_TOKENS = 0


class TrainingChain:
    """Lanes over `blocks`. `positions`: the positions of a request; `requests`: how many will follow each other.

    `plan` finds a chain, or `take` sets it; then `open` opens its lanes.
    """

    def __init__(
        self,
        finder: ChainFinder,
        connections: Connections,
        blocks: Span,
        width: int,
        terms: LaneTerms,
        patience: Patience,
        rng: random.Random,
        positions: int,
        requests: int,
    ) -> None:
        self.blocks = blocks
        # How often a hop was replaced.
        self.failovers = 0
        self._finder = finder
        self._connections = connections
        self._width = width
        self._terms = terms
        self._candidates = Candidates(TRAINING_RULES, patience, rng)
        self.positions = positions
        self.requests = requests
        self._hops: dict[int, Hop] = {}
        self._lanes: dict[int, TrainingLane] = {}
        self._locks: dict[int, trio.Lock] = {}
        # What peers said of requests that overflow, by the way that the request went.
        self._overflows = {way: self._refusals() for way in (FORWARD, BACKWARD)}
        # What peers said against our requests, by the first block of their hop.
        self._objections: dict[int, Refusals] = {}
        self._faults_without_answer = 0
        # Since something failed, until something is answered.
        self._search: Search | None = None

    def __repr__(self) -> str:
        return f"<TrainingChain {self.blocks} {' '.join(map(str, self.served_by))}>"

    @property
    def served_by(self) -> tuple[ServedBy, ...]:
        """Which peers serve which blocks now, in the order of the blocks; empty before the first request."""
        return tuple(ServedBy(hop.peer_id, hop.span) for _, hop in sorted(self._hops.items()))

    @property
    def hops(self) -> int:
        """The number of hops now."""
        return len(self._hops)

    async def plan(self) -> Chain:
        """Find a chain. Raises as `lane`."""
        return await self._plan(self.blocks)

    def take(self, chain: Chain) -> None:
        """Have these hops serve the chain's blocks, or some of them."""
        for hop in chain.hops:
            self._hops[hop.span.start] = hop

    async def open(self) -> None:
        """Open all lanes at the same time; find a chain before if there is none yet. Raises as `lane`."""
        if not self._hops:
            await self.plan()
        await at_once([partial(self.lane, start) for start in self._hops])

    async def lane(self, block: int) -> TrainingLane:
        """The lane whose blocks begin with `block`. Raises NoChain, Overloaded or CallerError."""
        async with self._locks.setdefault(block, trio.Lock()):
            while True:
                lane = self._lanes.get(block)
                if lane is not None and lane.broken is None:
                    return lane
                hop = self._hops[block]
                try:
                    self._lanes[block] = await open_lane(self._connections, hop, self._terms, self._width)
                except PeerdError as error:
                    await self._replace(hop, error)

    async def failed(self, lane: TrainingLane, error: PeerdError, way: str) -> None:
        """A request on this lane failed: have another peer take its blocks. Raises the errors that no other peer could
        avoid.

        A peer that reports overflow in its blocks, or says that the request is wrong, is left out, and is blamed once
        another peer has answered. If peers of two networks say so, or there is no other peer, that error is raised.
        `way` is FORWARD or BACKWARD: a successful forward proves nothing about a gradient.
        """
        if isinstance(error, BadResult):
            self._overflows[way].note(error, lane.hop.peer_id)
            if self._overflows[way].are_believed:
                raise error
        block = lane.hop.span.start
        async with self._locks.setdefault(block, trio.Lock()):
            # One lane can fail several requests, and a lane that we closed ourselves was not at fault.
            if self._lanes.get(block) is lane:
                del self._lanes[block]
                await self._replace(lane.hop, error)

    def answered(self, lane: TrainingLane, way: str) -> None:
        """Note that a request was answered."""
        for peer in self._overflows[way].settle([hop.peer_id for hop in self._hops.values()]):
            self._finder.failed(peer)
        self._overflows[way].clear()
        if (objections := self._objections.pop(lane.hop.span.start, None)) is not None:
            for peer in objections.settle([lane.hop.peer_id]):
                self._finder.failed(peer)
        self._faults_without_answer = 0
        self._search = None
        self._finder.succeeded(lane.hop.peer_id)

    def close(self) -> None:
        """End all lanes."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()

    async def _replace(self, hop: Hop, error: PeerdError) -> None:
        """Plan new hops for a failed hop's blocks, without the peers that failed."""
        now = trio.current_time()
        search = self._search = self._search or self._candidates.search(now)
        match search.refused(hop.peer_id, error, hop.span, asked_at=now, now=now):
            case GiveUp(why):
                raise why
            case AskAgain(is_blamed=True):
                self._finder.failed(hop.peer_id)
            case AskAgain(is_doubted=True):
                refusals = self._objections.setdefault(hop.span.start, self._refusals())
                refusals.note(error, hop.peer_id)
                if refusals.are_believed:
                    raise error
        self._faults_without_answer += 1
        if self._faults_without_answer > MAX_FAULTS_WITHOUT_ANSWER and not isinstance(error, Overloaded):
            raise error
        self.failovers += 1
        await self._plan(hop.span)

    async def _plan(self, span: Span) -> Chain:
        """Find hops over `span`, for as long as patience allows.

        Raises NoChain, Overloaded or UnsupportedFeature; what the peers said of the request if no other is left.
        """
        search = self._search or self._candidates.search(trio.current_time())
        while True:
            asked_at = trio.current_time()
            try:
                found = await self._find(span, search.exclude(asked_at))
                break
            except NoChain as missing:
                all_busy = bool(search.busy.away(trio.current_time())) and await self._is_served(span)
                match search.found_nobody(
                    missing,
                    span,
                    asked_at=asked_at,
                    now=trio.current_time(),
                    all_busy=all_busy,
                    may_return=bool(self._finder.avoided()),
                    answer=self._said_against_us(),
                ):
                    case WaitUntil(time):
                        await trio.sleep_until(time)
                    case GiveUp(error):
                        raise error from missing
        self.take(found)
        return found

    def _said_against_us(self) -> PeerdError | None:
        """What a peer last said of our request, if no other peer has answered since."""
        every = (*self._overflows.values(), *self._objections.values())
        return next((refusals.error for refusals in every if refusals), None)

    def _refusals(self) -> Refusals:
        return Refusals(tolerated=0, voice=partial(voice_of, self._connections), now=trio.current_time)

    async def _is_served(self, span: Span) -> bool:
        """Whether there are hops for these blocks at all, full ones included."""
        try:
            await self._find(span, self._candidates.barred)
        except NoChain:
            return False
        return True

    async def _find(self, span: Span, exclude: Collection[PeerId]) -> Chain:
        return await self._finder.find(
            span,
            tokens=_NO_TOKENS,
            exclude=exclude,
            positions=self.positions,
            adapter=AdapterNeed(self._terms.adapter),
            requests=self.requests,
        )

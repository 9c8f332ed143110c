"""The lanes along a chain for one client's training passes: finds, opens and replaces them.

A client has the input of every hop. So a lane that fails costs only the requests on it: another peer, or several, take
its blocks. Hops are only ever split into smaller ones, so a request at a border between hops always finds a lane that
begins there.
"""

from __future__ import annotations

import random
from functools import partial

import trio

from peerd.client.finding.finder import RETRY_S, ChainFinder, Patience
from peerd.client.finding.served_by import ServedBy
from peerd.client.training.lane import Lane, LaneTerms, open_lane
from peerd.net.connections import Connections
from peerd.protocol.errors import (
    BadResult,
    CallerError,
    Evicted,
    NoChain,
    NoRoom,
    NotServed,
    Overloaded,
    PeerdError,
    PeerFault,
    RelayLost,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import AdapterNeed
from peerd.routing.chains.chain import Hop
from peerd.trio_tools import at_once

FORWARD, BACKWARD = "forward", "backward"
# A training pass needs no KV.
_NO_TOKENS = 0
# After this many failures in a row without an answer, trying further is useless.
MAX_BARREN = 8
# How many peers must report that a request overflows, if there are so many; a single one may be broken, or lie.
OVERFLOWS_BELIEVED = 2


class PassChain:
    """Lanes over `blocks`. `positions`: the positions of a request; `requests`: how many will follow each other."""

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
        self._patience = patience
        self._rng = rng
        self._positions = positions
        self._requests = requests
        self._hops: dict[int, Hop] = {}
        self._lanes: dict[int, Lane] = {}
        self._locks: dict[int, trio.Lock] = {}
        # The peers that cannot train at all, and those that are too busy or too small now.
        self._unfit: set[PeerId] = set()
        self._busy: dict[PeerId, PeerdError] = {}
        # The peers whose blocks gave NaN or infinity, with their errors, by the direction of the request.
        self._overflowed: dict[str, dict[PeerId, BadResult]] = {FORWARD: {}, BACKWARD: {}}
        self._barren = 0
        # Since when there was no answer, counted from the first failure.
        self._troubled_since: float | None = None

    def __repr__(self) -> str:
        return f"<PassChain {self.blocks} {' '.join(map(str, self.served_by))}>"

    @property
    def served_by(self) -> tuple[ServedBy, ...]:
        """Which peers serve which blocks now, in the order of the blocks; empty before the first request."""
        return tuple(ServedBy(hop.peer_id, hop.span) for _, hop in sorted(self._hops.items()))

    @property
    def hops(self) -> int:
        """The number of hops now."""
        return len(self._hops)

    async def open(self) -> None:
        """Find a chain and open its lanes, all at the same time. Raises as `lane`."""
        await self._plan(self.blocks)

        await at_once([partial(self.lane, start) for start in self._hops])

    async def lane(self, block: int) -> Lane:
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

    async def failed(self, lane: Lane, error: PeerdError, way: str) -> None:
        """A request on this lane failed: have another peer take its blocks. Raises the errors that no other peer could
        avoid.

        A peer that reports overflow in its blocks is left out, and is blamed once another peer has answered. If two
        peers report it, or there is no other peer, that error is raised. `way` is FORWARD or BACKWARD: a successful
        forward proves nothing about a gradient.
        """
        if isinstance(error, BadResult):
            self._overflowed[way][lane.hop.peer_id] = error
            if len(self._overflowed[way]) >= OVERFLOWS_BELIEVED:
                raise error
        block = lane.hop.span.start
        async with self._locks.setdefault(block, trio.Lock()):
            # One lane can fail several requests, and a lane that we closed ourselves was not at fault.
            if self._lanes.get(block) is lane:
                del self._lanes[block]
                await self._replace(lane.hop, error)

    def answered(self, lane: Lane, way: str) -> None:
        """Note that a request was answered."""
        for peer in self._overflowed[way]:
            self._finder.failed(peer)
        self._overflowed[way].clear()
        self._barren = 0
        self._troubled_since = None
        self._finder.succeeded(lane.hop.peer_id)

    def close(self) -> None:
        """End all lanes."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()

    async def _replace(self, hop: Hop, error: PeerdError) -> None:
        """Plan new hops for a failed hop's blocks, without the peers that failed."""
        peer = hop.peer_id
        if self._troubled_since is None:
            self._troubled_since = trio.current_time()
        if isinstance(error, Evicted | RelayLost):
            # We were away for too long, or a relay was lost; the peer itself will serve us again.
            pass
        elif isinstance(error, Overloaded):
            self._busy[peer] = error
        elif isinstance(error, BadResult | UnsupportedFeature | NotServed):
            self._unfit.add(peer)
        elif isinstance(error, PeerFault):
            self._finder.failed(peer)
        elif isinstance(error, CallerError):
            raise error
        self._barren += 1
        if self._barren > MAX_BARREN and not isinstance(error, Overloaded):
            raise error
        self.failovers += 1
        await self._plan(hop.span)

    def _overflows(self) -> BadResult | None:
        """A peer's error about overflow, unless another peer has answered since."""
        return next((error for said in self._overflowed.values() for error in said.values()), None)

    async def _plan(self, span: Span) -> None:
        """Find hops over `span`, for as long as `patience` allows.

        Raises NoChain, Overloaded or UnsupportedFeature; BadResult if all peers overflow.
        """
        began = trio.current_time() if self._troubled_since is None else self._troubled_since
        while True:
            waited = trio.current_time() - began
            avoid = self._unfit | set(self._busy)
            try:
                need = AdapterNeed(self._terms.adapter)
                found = await self._finder.find(
                    span,
                    tokens=_NO_TOKENS,
                    exclude=avoid,
                    positions=self._positions,
                    adapter=need,
                    requests=self._requests,
                )
                break
            except NoChain as missing:
                overflowed = self._overflows()
                if overflowed and (not self._finder.avoided() or waited >= self._patience.missing_s):
                    # No other peer is left that may do better, and none will return soon.
                    raise overflowed from missing
                busy = next(iter(self._busy.values()), None)
                if busy is None and waited >= self._patience.missing_s:
                    raise
                # No peer has enough memory, or none became free while we waited.
                if isinstance(busy, NoRoom) or waited >= self._patience.busy_s:
                    raise (busy or missing) from missing
                self._busy.clear()
            await trio.sleep(RETRY_S * self._rng.random())
        for hop in found.hops:
            self._hops[hop.span.start] = hop

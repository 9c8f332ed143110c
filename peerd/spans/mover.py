"""Moves a span to where the swarm needs it more, while the peer serves.

Knows the order of a move; which move is worth it is `routing.placement`'s, what sessions hear of it the server's. A
peer that serves on several devices does not move: its spans stand side by side, and would have to move together.

The difficulty is that everybody decides alone, from a view that is a little old. So who means to move says so first,
waits for a random time, and looks again: of two who want the same gap, or trust each other to stay, at least one sees
the other. Files are fetched before anything is given up. It is looked once more before sessions are refused and, once
all can see that they are, before the blocks go; only then is the old engine freed, and the new one loaded into the
memory that it had. Until the blocks go, whatever goes wrong leaves the peer where it was; after that it goes back
there.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol

import torch
import trio

from peerd.compute.errors import CheckpointError
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.dht.record_sets import PartialView
from peerd.routing.placement.placement import choose_move
from peerd.server.served_spans import ServedSpan
from peerd.spans.first_choice import Announcing, announce
from peerd.spans.loading import LoadedSpan
from peerd.spans.slots import Place

log = logging.getLogger(__name__)

# Between looks, and by how much either way: servers that see the same must not act at the same time.
LOOK_S = 300.0
LOOK_SPREAD = 0.5
# Between saying that we move and looking again. An announcement takes a second or two to be where others look.
MAX_HESITATION_S = 30.0
MIN_HESITATION_S = 4.0
# A move whose goal changed so often while it was announced is left for the next look.
MAX_GOALS = 3
# What sessions get to end before they are cut; their clients then find other peers, at the price of a replay.
MAX_DRAIN_S = 600.0
# After a load that failed, looks come at most so much more seldom.
MAX_BACKOFF = 16
# Where not even the old span can be loaded.
FIRST_RETRY_S = 60.0
MAX_RETRY_S = 1800.0
# For handlers that still say goodbye to let go of the old engine: twice what they may take.
LET_GO_S = 5.0
LET_GO_LOOKS = 10

# What loading may fail with that another time, or another span, may not.
LOAD_ERRORS = (CheckpointError, PeerdError, OSError, MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a peer waits, in seconds: about so long between looks, at most so long before it looks again at what it
    said, and at most so long for sessions to end.
    """

    look_s: float = LOOK_S
    hesitation_s: float = MAX_HESITATION_S
    drain_s: float = MAX_DRAIN_S

    @classmethod
    def looking_every(cls, look_s: float | None) -> Pace:
        """The usual, but for how often we look, if that is said; then we hesitate as much less."""
        if look_s is None:
            return cls()
        return cls(look_s, max(MIN_HESITATION_S, MAX_HESITATION_S * min(1.0, look_s / LOOK_S)))


class Loading(Protocol):
    """Loads spans of the place's model: `SpanLoader`."""

    async def on_disk(self) -> frozenset[int]: ...

    async def fetch(self, span: Span) -> None: ...

    async def load(self, span: Span) -> tuple[ServedSpan, LoadedSpan]: ...

    async def free(self) -> None: ...


class Hosting(Protocol):
    """Serves sessions on spans: `Server`."""

    @property
    def sessions(self) -> int: ...

    def serve(self, served: ServedSpan) -> None: ...

    def refuse(self, served: ServedSpan) -> None: ...

    def resume(self, served: ServedSpan) -> None: ...

    async def wait_unused(self, served: ServedSpan, timeout_s: float) -> None: ...

    async def withdraw(self, served: ServedSpan) -> None: ...


class Rebalancer:
    """Moves what is in one place. `run` once, in a nursery; `stop` ends it."""

    def __init__(
        self,
        place: Place,
        loader: Loading,
        server: Hosting,
        discovery: Announcing,
        peer_id: PeerId,
        block_count: int,
        random: Random,
        pace: Pace | None = None,
    ) -> None:
        assert place.served is not None
        self._place = place
        self._loader = loader
        self._server = server
        self._discovery = discovery
        self._peer_id = peer_id
        self._model = place.served.model
        self._block_count = block_count
        self._random = random
        self._pace = pace or Pace()
        self._scope = trio.CancelScope()
        self._stopped = False
        self.moves = 0

    def __repr__(self) -> str:
        return f"<Rebalancer of {self._place.served} moves={self.moves}>"

    def stop(self) -> None:
        """Move no more. What has been given up for a move is not loaded any more."""
        self._stopped = True
        self._scope.cancel()

    async def run(self) -> None:
        """Look and move, until `stop`. May be started again where it failed."""
        failures = 0
        with trio.CancelScope() as self._scope:
            while not self._stopped:
                pause_s = self._pace.look_s * self._random.uniform(1 - LOOK_SPREAD, 1 + LOOK_SPREAD)
                await trio.sleep(pause_s * min(2**failures, MAX_BACKOFF))
                failures = 0 if await self._look_and_move() else failures + 1

    @property
    def _span(self) -> Span:
        assert self._place.served is not None
        return self._place.served.span

    async def _look_and_move(self) -> bool:
        """One round. False where a move failed; then we are in the old place again."""
        try:
            goal = await self._agree_on_goal()
            if goal is None:
                return True
            # While we still serve: it may take hours.
            await self._loader.fetch(goal)
            if await self._look(goal) == goal and await self._give_up(goal):
                return await self._settle(goal)
            return True
        except LOAD_ERRORS as error:
            log.warning("cannot move to other blocks: %s; still serving %s", error, self._span)
            return False
        finally:
            if self._place.intended is not None:
                self._say(None)

    async def _agree_on_goal(self) -> Span | None:
        """Where to go, once others know of it and still leave it to us."""
        goal = await self._look()
        for _ in range(MAX_GOALS):
            if goal is None:
                return None
            self._place.intended = goal
            await announce(self._discovery)
            await trio.sleep(self._random.uniform(0, self._pace.hesitation_s))
            said, goal = goal, await self._look(goal)
            if goal == said:
                return goal
        return None

    async def _look(self, said: Span | None = None) -> Span | None:
        """Where the swarm needs us now, having `said` where we go; None for here, or where we cannot see all of it, or
        not even ourselves in it.
        """
        try:
            holdings = await self._discovery.directory.holdings(self._model, self._block_count)
        except PartialView as error:
            log.info("not moving anywhere: the whole swarm cannot be seen: %s", error)
            return None
        ours = [one for one in holdings if one.peer_id == self._peer_id]
        own = next((one for one in ours if one.record.slot == self._place.slot), None)
        if own is None or own.record.span != self._span:
            return None
        choose = partial(choose_move, holdings, own, self._block_count, said=said)
        # At best all is on disk; to know what is takes a look at the hub.
        if choose(on_disk=frozenset(range(self._block_count))) is None:
            return None
        return choose(on_disk=await self._loader.on_disk())

    def _say(self, goal: Span | None) -> None:
        self._place.intended = goal
        self._discovery.changed()

    async def _give_up(self, goal: Span) -> bool:
        """Stop serving here, sessions first. False, and serving as before, where the swarm needs us here after all."""
        served = self._place.served
        assert served is not None
        log.info(
            "moving from blocks %s to %s, where the swarm needs them more; %d open sessions get %g s to end",
            served.span,
            goal,
            self._server.sessions,
            self._pace.drain_s,
        )
        gone = False
        self._server.refuse(served)
        try:
            # Who sees us leave counts on us no more, before we count on them for the last time.
            await announce(self._discovery)
            await self._server.wait_unused(served, self._pace.drain_s)
            if await self._look(goal) == goal:
                await self._server.withdraw(served)
                gone = True
            else:
                log.info("staying with blocks %s: the swarm has changed meanwhile", served.span)
        finally:
            if not gone:
                self._server.resume(served)
                self._discovery.changed()
        return gone

    async def _settle(self, goal: Span) -> bool:
        """Load the new span where the old one was. False, and the old one again, if that fails."""
        old = self._span
        await self._free()
        failure = await self._load(goal)
        if failure is None:
            self.moves += 1
            log.info("moved from blocks %s to %s", old, goal)
            return True
        log.warning("cannot load blocks %s: %s; going back to %s", goal, failure, old)
        await self._load_again(old)
        return False

    async def _free(self) -> None:
        """Free what was served. Nobody uses it any more, but for handlers that say goodbye."""
        assert self._place.served is not None
        engine = weakref.ref(self._place.served.task.engine)
        self._place.vacate()
        self._discovery.changed()
        for _ in range(LET_GO_LOOKS):
            if not _alive(engine):
                break
            await trio.sleep(LET_GO_S / LET_GO_LOOKS)
        else:
            log.warning("the blocks that were served are still in memory: loading others may fail")
        await self._loader.free()

    async def _load(self, span: Span) -> str | None:
        """Load, serve and announce a span. Returns why not where it cannot be."""
        self._say(span)
        try:
            served, loaded = await self._loader.load(span)
            # No await from here on: it is served and announced, or not at all.
            self._place.fill(served, loaded)
        except LOAD_ERRORS as error:
            # As text: the error itself would hold on to whatever was loaded before it.
            failure = str(error) or type(error).__name__
        else:
            self._server.serve(served)
            self._discovery.changed()
            return None
        await self._loader.free()
        return failure

    async def _load_again(self, span: Span) -> None:
        """Load what was here before, however often it takes."""
        retry_s = FIRST_RETRY_S
        while (failure := await self._load(span)) is not None:
            # Nobody should wait for us.
            self._say(None)
            log.warning("serving nothing: cannot load blocks %s either: %s; trying again", span, failure)
            await trio.sleep(retry_s * self._random.uniform(0.8, 1.2))
            retry_s = min(2 * retry_s, MAX_RETRY_S)
        log.info("serving blocks %s again", span)


def _alive(engine: Callable[[], object]) -> bool:
    # Models hold themselves: without the collector they would go some time later.
    if engine() is not None:
        gc.collect()
    return engine() is not None

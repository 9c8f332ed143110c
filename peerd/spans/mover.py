"""Moves a span to blocks where the swarm needs it more, while the peer serves.

`routing/placement` computes which move is worth it; here are the steps of a move. A peer that serves on several devices
does not move, because its spans stand side by side and would have to move together.

Every server decides alone, from a view that is a few seconds old. So a server that wants to move announces its goal
first, waits for a random time, and looks again: of two servers that want the same gap, or rely on each other to stay,
at least one sees the other. The new files are downloaded before anything is given up. The server looks again before it
refuses sessions, and once more when all peers can see that it refuses, before it gives up its blocks. Then the old
engine is freed and the new one is loaded into its memory. Until the blocks are given up, any failure leaves the server
where it was; after that, a failure makes it load its old span again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from random import Random

import trio

from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span
from peerd.routing.dht.record_sets import PartialView
from peerd.routing.placement.placement import choose_move
from peerd.spans.covered import is_left_covered, present
from peerd.spans.first_choice import Announcing, announce
from peerd.spans.slots import Slot
from peerd.spans.swap import LOAD_ERRORS, Hosting, Loading, SpanSwap

log = logging.getLogger(__name__)

# The time between looks, and the spread of it: servers that see the same swarm must not act at the same time.
LOOK_S = 300.0
LOOK_SPREAD = 0.5
# The time between announcing a move and looking again. An announcement takes a second or two to reach the records that
# others read.
MAX_HESITATION_S = 30.0
MIN_HESITATION_S = 4.0
# A move whose goal changed this often while it was announced is left for the next look.
MAX_GOALS = 3
# The time that sessions get to end. Then they are cut, and their clients find other peers, which costs a replay.
MAX_DRAIN_S = 600.0
# After failed loads the time between looks grows at most by this factor.
MAX_BACKOFF = 16


@dataclass(frozen=True, slots=True)
class MoveTiming:
    """How long a peer waits, in seconds.

    look_s: between looks, on average.
    hesitation_s: at most, between announcing a goal and looking again.
    drain_s: at most, for sessions to end.
    """

    look_s: float = LOOK_S
    hesitation_s: float = MAX_HESITATION_S
    drain_s: float = MAX_DRAIN_S

    @classmethod
    def looking_every(cls, look_s: float | None) -> MoveTiming:
        """The usual times, with looks every `look_s` seconds if given; the hesitation is scaled down with it."""
        if look_s is None:
            return cls()
        return cls(look_s, max(MIN_HESITATION_S, MAX_HESITATION_S * min(1.0, look_s / LOOK_S)))


class Rebalancer:
    """Moves the span in one slot. `run` it once, in a nursery; `stop` ends it."""

    def __init__(
        self,
        slot: Slot,
        loader: Loading,
        server: Hosting,
        discovery: Announcing,
        peer_id: PeerId,
        block_count: int,
        random: Random,
        pace: MoveTiming | None = None,
        swap: SpanSwap | None = None,
    ) -> None:
        assert slot.served is not None
        self._slot = slot
        self._swap = swap or SpanSwap(slot, loader, server, discovery, random)
        self._loader = loader
        self._server = server
        self._discovery = discovery
        self._peer_id = peer_id
        self._model = slot.served.model
        self._block_count = block_count
        self._random = random
        self._pace = pace or MoveTiming()
        self._scope = trio.CancelScope()
        self._stopped = False
        self.moves = 0

    def __repr__(self) -> str:
        return f"<Rebalancer of {self._slot.served} moves={self.moves}>"

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
        assert self._slot.served is not None
        return self._slot.served.span

    async def _look_and_move(self) -> bool:
        """One round. Returns False if a move failed; then the old span is served again."""
        try:
            goal = await self._agree_on_goal()
            if goal is None:
                return True
            # The server still serves meanwhile: the download may take hours.
            await self._loader.fetch(goal)
            if await self._look(goal) != goal:
                return True
            # Not while the span is being loaded again after its device failed.
            async with self._swap.lock:
                return await self._settle(goal) if await self._give_up(goal) else True
        except LOAD_ERRORS as error:
            log.warning("cannot move to other blocks: %s; still serving %s", error, self._span)
            return False
        finally:
            if self._slot.intended is not None:
                self._say(None)

    async def _agree_on_goal(self) -> Span | None:
        """The span to move to, once others know of our intention and still leave it to us; None to stay."""
        goal = await self._look()
        for _ in range(MAX_GOALS):
            if goal is None:
                return None
            self._slot.intended = goal
            await announce(self._discovery)
            await trio.sleep(self._random.uniform(0, self._pace.hesitation_s))
            intended, goal = goal, await self._look(goal)
            if goal == intended:
                return goal
        return None

    async def _look(self, intended: Span | None = None) -> Span | None:
        """The span where the swarm needs us now, after we announced `intended`. None to stay.

        None also while serving is paused, if we cannot see the whole swarm, or not our own announcement in it, and if
        we do not reach another server for each of our blocks.
        """
        if self._server.paused:
            return None
        try:
            announced = await self._discovery.directory.holdings(self._model, self._block_count)
        except PartialView as error:
            log.info("not moving: this peer cannot see the whole swarm: %s", error)
            return None
        holdings = present(announced, self._discovery)
        ours = [one for one in holdings if one.peer_id == self._peer_id]
        own = next((one for one in ours if one.record.slot == self._slot.number), None)
        if own is None or own.record.span != self._span:
            return None
        choose = partial(choose_move, holdings, own, self._block_count, intended=intended)
        # First assume that all is on disk: to know what really is takes requests to the hub.
        if choose(on_disk=frozenset(range(self._block_count))) is None:
            return None
        goal = choose(on_disk=await self._loader.on_disk())
        if goal is None or await is_left_covered(holdings, self._peer_id, self._span, self._discovery, self._random):
            return goal
        log.info("not moving: this peer does not reach another server for each of the blocks %s", self._span)
        return None

    def _say(self, goal: Span | None) -> None:
        self._slot.intended = goal
        self._discovery.announce_soon()

    async def _give_up(self, goal: Span) -> bool:
        """Stop serving the old span: first its sessions, then its blocks.

        Returns False, and serves as before, if the swarm needs us here after all.
        """
        served = self._slot.served
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
            # Announce that we leave before our last look, so that no two servers rely on each other.
            await announce(self._discovery)
            await self._server.wait_unused(served, self._pace.drain_s)
            if await self._look(goal) == goal:
                await self._server.withdraw(served)
                gone = True
            else:
                log.info("keeping blocks %s: the swarm has changed meanwhile", served.span)
        finally:
            if not gone:
                self._server.resume(served)
                self._discovery.announce_soon()
        return gone

    async def _settle(self, goal: Span) -> bool:
        """Load the new span in place of the old one. If that fails, load the old one again and return False."""
        old = self._span
        await self._swap.vacate()
        failure = await self._swap.load(goal)
        if failure is None:
            self.moves += 1
            log.info("moved from blocks %s to %s", old, goal)
            return True
        log.warning("cannot load blocks %s: %s; going back to %s", goal, failure, old)
        await self._swap.load_again(old)
        return False

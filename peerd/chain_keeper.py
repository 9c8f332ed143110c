"""Keeps a chain open under a session: opens it, hears its hops, and mends or replaces it when they die.

Knows hops, faults and routes; what was sent and answered is `step_log`'s. The difficulty is that a death can
come between any two messages, also while the last one is being mended. So nothing is sent that is not in
the log first, answers of an older epoch are ignored, and recovery is always the same: bring a chain to where
the log's `retained` stands, then send its `pending` again (spec/session.md, "When a hop dies").
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from peerd.control_stream import ControlStream
from peerd.open_chain import ChainOpener, HopRefused, OpenChain, Terms
from peerd.protocol.errors import (
    CallerError,
    Evicted,
    LinkFailed,
    NoChain,
    NotServed,
    Overloaded,
    PeerdError,
    PeerFault,
    RemoteProtocolError,
    UnsupportedFeature,
)
from peerd.protocol.frames import Priority
from peerd.protocol.identity import PeerId
from peerd.protocol.messages import MAX_STEP_POSITIONS, Failure, Gap, LinkDown, Output, Routed
from peerd.protocol.schema import Message
from peerd.protocol.span import Span
from peerd.protocol.tensors import DTYPES
from peerd.routing.adapters import NO_ADAPTER, AdapterNeed
from peerd.routing.chain import Between, Chain
from peerd.step_log import Pending, StepLog
from peerd.step_tensors import encoded, priority_of, replay_steps

# Between two tries at a chain, at random up to this, so that two clients do not collide forever.
RETRY_S = 1.0
# A route stands once the upstream hop has replayed what the replacement lacks.
ROUTE_DEADLINE_S = 30.0
# A chain that opens and fails, again and again, without one answer: two peers that cannot reach each other.
MAX_BARREN_RECOVERIES = 6
# A step of 128 positions on a slow machine takes a minute; longer than this no honest hop computes.
STEP_DEADLINE_S = 180.0
BYTES_A_VALUE = 4


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a session tries to get a chain before its steps fail."""

    # Who has just died may have a twin that nobody told us of yet, or one that is about to start.
    missing_s: float = 5.0
    # Peers that are full: other sessions end.
    busy_s: float = 120.0


class ChainFinder(Protocol):
    """Finds peers for blocks, and hears how they did."""

    async def find(
        self,
        blocks: Span,
        *,
        tokens: int,
        exclude: Collection[PeerId],
        positions: int = 1,
        adapter: AdapterNeed = NO_ADAPTER,
        requests: int = 0,
        between: Between | None = None,
    ) -> Chain:
        """The best chain over `blocks` for steps of so many positions, of peers that have the adapter, by what is
        known now. `requests`: as in ChainNeeds. `between`: of a replacement, who stands before and after it.
        Raises NoChain."""

    async def adapter_id(self, name: str, blocks: Span) -> str:
        """What an adapter's name means for `blocks`. Raises NoChain, saying which adapters there are."""

    def failed(self, peer: PeerId) -> None:
        """The peer broke a promise: leave it out for a while."""

    def succeeded(self, peer: PeerId) -> None:
        """The peer keeps its promises."""


class ChainKeeper:
    """A chain over `blocks` for the steps in `log`. `run` owns its tasks.

    `changed` is unparked whenever steps were answered or given up, or the chain is another.
    """

    def __init__(
        self,
        finder: ChainFinder,
        opener: ChainOpener,
        blocks: Span,
        width: int,
        terms: Terms,
        rng: random.Random,
        patience: Patience,
        log: StepLog,
    ) -> None:
        self.failovers = 0
        # Positions that were sent again to bring replacements to where their predecessors stood.
        self.replayed_positions = 0
        # How often none of a chain's hops could be kept, so that all of them had to compute the past again.
        self.reopened = 0
        self.changed = trio.lowlevel.ParkingLot()
        self._finder = finder
        self._opener = opener
        self._blocks = blocks
        self._width = width
        self._terms = terms
        self._dtype = DTYPES[terms.dtype]
        self._rng = rng
        self._patience = patience
        self._log = log
        self._chain: OpenChain | None = None
        # Steps may be sent: the chain stands where the log says.
        self._ready = False
        # Every hop of the chain has replayed what it had to: one death can be mended.
        self._whole = False
        self._mending: ControlStream | None = None
        self._faults: list[tuple[ControlStream, PeerdError]] = []
        self._routed_epoch = -1
        # Recoveries since the last answer.
        self._barren = 0
        # When the last step was answered, or the first was asked for.
        self._progress = trio.current_time()
        self._alarm = trio.Event()
        self._attempt = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<ChainKeeper {self._chain or 'no chain'} ready={self._ready}>"

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a chain open whenever there is something to send on it, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                nursery.start_soon(self._watch_pace)
                await self._keep_open()
        finally:
            self._drop_chain()

    def describe(self) -> list[dict[str, object]]:
        """Who serves which blocks now; empty where no chain is open."""
        return self._chain.describe() if self._chain is not None else []

    @property
    def max_steps(self) -> int:
        """Steps that may be unanswered at a time."""
        return self._chain.max_steps if self._chain is not None else self._terms.max_steps

    @property
    def epoch(self) -> int:
        """The route's number."""
        return self._chain.epoch if self._chain is not None else 0

    def submit(self, pending: Pending) -> None:
        """Send a step that is in the log, now or as soon as there is a chain."""
        if len(self._log.pending) == 1:
            self._progress = trio.current_time()
        if self._ready:
            self._send(pending)
        else:
            self._alarm.set()

    def _send(self, pending: Pending) -> None:
        """Send a step to the first hop; if that is gone, its reader raises the alarm."""
        assert self._chain is not None
        first = self._chain.controls[0]
        step = replace(pending.step, epoch=self._chain.epoch)
        header, body = encoded(step, pending.hidden, self._terms.codec, self._dtype)
        with suppress(PeerFault, trio.ClosedResourceError):
            first.stream.send_nowait(header, body, priority=priority_of(step.positions))

    # What the hops say.

    async def _read(self, control: ControlStream) -> None:
        try:
            await control.read(self._on_message, MAX_STEP_POSITIONS * self._width * BYTES_A_VALUE)
        except trio.ClosedResourceError:
            return
        except PeerdError as error:
            self._fault(control, error)

    def _on_message(self, control: ControlStream, message: Message, body: memoryview) -> None:
        if isinstance(message, Output):
            self._on_output(control, message, body)
        elif isinstance(message, Failure):
            self._on_failure(control, message)
        elif isinstance(message, Routed):
            self._on_routed(message)
        elif isinstance(message, LinkDown):
            if message.epoch == self.epoch:
                self._fault(control, LinkFailed(message.message))
        elif isinstance(message, Gap):
            # Its cache is not what we think it is: only a new chain is sure to agree with us.
            self._whole = False
            self._fault(control, Evicted(f"{control.hop.peer_id} has only {message.have}"))
        else:
            raise RemoteProtocolError(f"{message.TYPE} in the middle of a session")

    def _on_output(self, control: ControlStream, output: Output, body: memoryview) -> None:
        if output.epoch != self.epoch or output.seq not in self._log.pending:
            return
        self._log.answer(output, body, self._width)
        self._barren = 0
        self._progress = trio.current_time()
        self._finder.succeeded(control.hop.peer_id)
        self.changed.unpark_all()

    def _on_failure(self, control: ControlStream, failure: Failure) -> None:
        error = failure.error
        if failure.seq is None or not isinstance(error, CallerError):
            self._fault(control, error)
        elif failure.seq in self._log.pending:
            # What was refused no other peer can mend; nor what was built on it.
            self._log.fail(error)
            self.changed.unpark_all()

    def _on_routed(self, routed: Routed) -> None:
        if routed.epoch == self.epoch:
            self.replayed_positions += routed.replayed
            self._routed_epoch = routed.epoch
            self.changed.unpark_all()

    def _fault(self, control: ControlStream, error: PeerdError) -> None:
        if self._chain is None or control not in self._chain.controls:
            return
        if self._culprit(control, error) is self._mending:
            # Its death is told twice, by itself and by the hop before it.
            if isinstance(error, PeerFault):
                self._finder.failed(control.hop.peer_id)
            return
        self._faults.append((control, error))
        self._ready = False
        self._attempt.cancel()
        self._alarm.set()

    # Recovery.

    async def _keep_open(self) -> None:
        while True:
            await self._alarm.wait()
            self._alarm = trio.Event()
            if self._ready:
                continue
            try:
                await self._recover()
            except PeerdError as error:
                self._drop_chain()
                self._barren = 0
                self._log.fail(error)
                self.changed.unpark_all()

    async def _watch_pace(self) -> None:
        """Find hops that answer our pings and not our steps. Nobody knows which hop it is, so nobody is blamed."""
        while True:
            await trio.sleep(STEP_DEADLINE_S / 10)
            late = trio.current_time() - self._progress >= STEP_DEADLINE_S
            if late and self._ready and self._log.pending and self._chain is not None:
                self._whole = False
                self._fault(self._chain.controls[0], Overloaded(f"no answer within {STEP_DEADLINE_S:g} s"))

    async def _recover(self) -> None:
        """Get to a chain that stands where `retained` does, then send `pending` again."""
        failing_over = self._chain is not None
        faults, self._faults = self._faults, []
        self._barren += 1
        if faults and self._barren > MAX_BARREN_RECOVERIES:
            raise faults[-1][1]
        exclude = self._blame(faults)
        with trio.CancelScope() as self._attempt:
            if not (self._whole and len(faults) == 1 and await self._mend(*faults[0], exclude)):
                await self._reopen(exclude)
            self._whole = True
        if self._faults or not self._whole:
            # Somebody died meanwhile: the alarm is set, and this runs again.
            self._alarm.set()
            return
        self.failovers += failing_over
        self._ready = True
        self._progress = trio.current_time()
        for pending in list(self._log.pending.values()):
            self._send(pending)
        self.changed.unpark_all()

    def _blame(self, faults: Sequence[tuple[ControlStream, PeerdError]]) -> set[PeerId]:
        """Tell the finder who failed. A broken link blames neither end, but its far end is not asked again."""
        exclude = set()
        for control, error in faults:
            if isinstance(error, CallerError):
                raise error
            if isinstance(error, PeerFault):
                self._finder.failed(control.hop.peer_id)
            elif isinstance(error, LinkFailed):
                exclude.add(self._culprit(control, error).hop.peer_id)
        return exclude

    def _culprit(self, control: ControlStream, error: PeerdError) -> ControlStream:
        """The hop to replace: the one that failed, or the far end of a link that did."""
        assert self._chain is not None
        controls = self._chain.controls
        if not isinstance(error, LinkFailed):
            return control
        return controls[min(controls.index(control) + 1, len(controls) - 1)]

    async def _mend(self, control: ControlStream, error: PeerdError, exclude: set[PeerId]) -> bool:
        """Replace one hop and let its upstream replay, so that the others keep their KV. False: reopen."""
        chain = self._chain
        if chain is None or not self._log.repeatable:
            return False
        self._whole = False
        dead = self._mending = self._culprit(control, error)
        try:
            return await self._replace(chain, dead, exclude)
        finally:
            self._mending = None

    async def _replace(self, chain: OpenChain, dead: ControlStream, exclude: set[PeerId]) -> bool:
        index = chain.controls.index(dead)
        try:
            hops = [None, *(control.hop.peer_id for control in chain.controls), None]
            found = await self._find(dead.hop.span, exclude, (hops[index], hops[index + 2]))
            if len(found.hops) != 1:
                return False
            replacement = await self._opener.open_replacement(chain, index, found.hops[0], self._terms)
        except NoChain:
            return False
        except HopRefused as refused:
            self._refused(refused, exclude)
            return False
        dead.close()
        chain.replace(index, replacement)
        self._nursery.start_soon(self._read, replacement)
        if index == 0:
            await self._replay(push_from=self._log.retained.lengths)
            return True
        return await self._reroute(chain, index)

    async def _reroute(self, chain: OpenChain, index: int) -> bool:
        """Point the hop before `index` to its new next hop, and wait until it has replayed."""
        upstream = chain.controls[index - 1]
        route = await self._opener.route(chain, upstream, chain.controls[index])
        try:
            upstream.send_nowait(route, priority=Priority.CONTROL)
        except (PeerFault, trio.ClosedResourceError):
            return False
        with trio.move_on_after(ROUTE_DEADLINE_S):
            while self._routed_epoch != chain.epoch:
                await self.changed.park()
        return self._routed_epoch == chain.epoch

    async def _reopen(self, exclude: set[PeerId]) -> None:
        """Open a new chain and send it everything. Raises NoChain, Overloaded, CallerError."""
        self.reopened += self._chain is not None
        self._drop_chain()
        chain = await self._open_some_chain(exclude)
        self._chain = chain
        for control in chain.controls:
            self._nursery.start_soon(self._read, control)
        await self._replay(push_from={})

    async def _open_some_chain(self, exclude: set[PeerId]) -> OpenChain:
        """Try until a chain opens: as long as `patience_s` allows, and longer where peers are only busy."""
        started = trio.current_time()
        while True:
            waited = trio.current_time() - started
            try:
                found = await self._find(self._blocks, exclude)
                return await self._opener.open(found, self._terms)
            except NoChain:
                if waited >= self._patience.missing_s and not exclude:
                    raise
                exclude.clear()
            except HopRefused as refused:
                self._refused(refused, exclude)
                busy = isinstance(refused.error, Overloaded)
                if waited >= (self._patience.busy_s if busy else self._patience.missing_s):
                    raise _unmet(refused) from refused
            await trio.sleep(RETRY_S * self._rng.random())

    async def _find(self, blocks: Span, exclude: set[PeerId], between: Between | None = None) -> Chain:
        terms = self._terms
        return await self._finder.find(
            blocks, tokens=terms.tokens, exclude=exclude, adapter=terms.adapter_need, between=between
        )

    def _refused(self, refused: HopRefused, exclude: set[PeerId]) -> None:
        """Who is busy is left out until nobody else is left; who broke a promise, by the finder."""
        error = refused.error
        if isinstance(error, Overloaded):
            exclude.add(refused.hop.peer_id)
        elif isinstance(error, PeerFault | NotServed | UnsupportedFeature):
            self._finder.failed(refused.hop.peer_id)
        else:
            raise error from refused

    async def _replay(self, push_from: Mapping[int, int]) -> None:
        """Bring the first hop to where `retained` stands; it passes on positions from `push_from`."""
        assert self._chain is not None
        stream = self._chain.controls[0].stream
        # Where the stream breaks, its reader says so.
        with suppress(PeerFault, trio.ClosedResourceError):
            for step, hidden in replay_steps(self._log.retained, {}, push_from, self._chain.epoch):
                header, body = encoded(step, hidden, self._terms.codec, self._dtype)
                await stream.send(header, body, priority=priority_of(step.positions))
                self.replayed_positions += step.positions

    def _drop_chain(self) -> None:
        if self._chain is not None:
            self._chain.close()
        self._chain = None
        self._ready = False
        self._whole = False
        self._faults.clear()


def _unmet(refused: HopRefused) -> PeerdError:
    """What a caller hears when patience ends. Who is announced but gone serves nothing: its blocks are missing."""
    error, span = refused.error, refused.hop.span
    if isinstance(error, PeerFault):
        return NoChain(f"nobody reachable serves blocks {span}: {error}", ((span.start, span.end),))
    return error

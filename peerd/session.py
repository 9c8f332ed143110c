"""A client's session: rows of activations on a chain of peers, kept going when peers die.

Knows the chain and how to mend it; what was sent and answered is `step_log`'s. The difficulty is that a
death can come between any two messages. So nothing is sent that is not in the log first, answers of an
older epoch are ignored, and recovery is always the same: bring a chain to where the log's `retained`
stands, then send its `pending` again (spec/session.md, "When a hop dies").
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import trio

from peerd.control_stream import ControlStream
from peerd.open_chain import ChainOpener, HopRefused, OpenChain, Terms
from peerd.protocol.errors import (
    CallerError,
    Evicted,
    InternalError,
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
from peerd.protocol.messages import MAX_STEP_POSITIONS, Failure, Gap, LinkDown, Output, Routed, Want
from peerd.protocol.rows import Op, RowSlice
from peerd.protocol.schema import Message
from peerd.protocol.span import Span
from peerd.protocol.tensors import DTYPES
from peerd.routing.chain import Chain
from peerd.step_log import Pending, StepLog
from peerd.step_tensors import PREFILL_POSITIONS, encoded, priority_of, replay_steps

# Between two tries at a chain, at random up to this, so that two clients do not collide forever.
RETRY_S = 1.0
# A route stands once the upstream hop has replayed what the replacement lacks.
ROUTE_DEADLINE_S = 30.0
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

    async def find(self, blocks: Span, *, tokens: int, exclude: Collection[PeerId]) -> Chain:
        """The best chain over `blocks` by what is known now. Raises NoChain."""

    def failed(self, peer: PeerId) -> None:
        """The peer broke a promise: leave it out for a while."""

    def succeeded(self, peer: PeerId) -> None:
        """The peer keeps its promises."""


class Session:
    """Runs steps along a chain over `blocks`. `run` owns its tasks.

    `hidden` is `[positions, width]`, on the CPU; what comes back has the session's wire dtype.
    """

    def __init__(
        self,
        finder: ChainFinder,
        opener: ChainOpener,
        blocks: Span,
        width: int,
        terms: Terms,
        rng: random.Random,
        patience: Patience = Patience(),
    ) -> None:
        self.failovers = 0
        # Positions that were sent again to bring replacements to where their predecessors stood.
        self.replayed_positions = 0
        self.log = StepLog(max_length=terms.max_length, max_rows=terms.max_rows, max_rollback=terms.max_rollback)
        self._finder = finder
        self._opener = opener
        self._blocks = blocks
        self._width = width
        self._terms = terms
        self._dtype = DTYPES[terms.dtype]
        self._rng = rng
        self._patience = patience
        self._chain: OpenChain | None = None
        # Steps may be sent: the chain stands where the log says.
        self._ready = False
        # Every hop of the chain has replayed what it had to: one death can be mended.
        self._whole = False
        self._mending: ControlStream | None = None
        self._faults: list[tuple[ControlStream, PeerdError]] = []
        self._routed_epoch = -1
        self._alarm = trio.Event()
        self._changed = trio.lowlevel.ParkingLot()
        self._attempt = trio.CancelScope()
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<Session {self._chain or 'no chain'} {self.log}>"

    @property
    def chain(self) -> list[dict[str, object]]:
        """Who serves which blocks now; empty before the first step."""
        return self._chain.describe() if self._chain is not None else []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the session's chain open until `close`."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    task_status.started()
                    await self._keep_open()
        finally:
            if self._chain is not None:
                self._chain.close()

    def close(self) -> None:
        """End the session on every hop."""
        self._scope.cancel()

    async def open(self) -> None:
        """Open a chain now rather than with the first step. Raises NoChain, Overloaded, CallerError."""
        await self.step(torch.empty((0, self._width), dtype=self._dtype), want="none")

    async def step(
        self,
        hidden: torch.Tensor,
        *,
        row: int = 0,
        start: int | None = None,
        rows: Sequence[RowSlice] | None = None,
        ops: Sequence[Op] = (),
        want: Want = "last",
    ) -> torch.Tensor:
        """Run new positions and return what `want` asks for, `[positions, width]`.

        One `row` from `start` (default: its end), cut there if it is longer; or several, as `rows`.
        Long ones travel in pieces on which the hops work at the same time. Raises InvalidRequest,
        ContextTooLong, NoChain, Overloaded. Cancelled, the positions may be cached or not: say `start`.
        """
        parts = await self._submit_all(hidden, self._slices(hidden, row, start, rows), ops, want)
        for part in parts:
            await part.done.wait()
        results = []
        for part in parts:
            if part.result is None:
                raise part.error or InternalError("a step ended without result or error")
            results.append(part.result)
        return torch.cat(results) if want == "all" and len(results) > 1 else results[-1]

    def _slices(
        self, hidden: torch.Tensor, row: int, start: int | None, rows: Sequence[RowSlice] | None
    ) -> tuple[RowSlice, ...]:
        if rows is not None:
            return tuple(rows)
        if not len(hidden):
            return ()
        return (RowSlice(row, self.log.length(row) if start is None else start, len(hidden)),)

    async def _submit_all(
        self, hidden: torch.Tensor, rows: tuple[RowSlice, ...], ops: Sequence[Op], want: Want
    ) -> list[Pending]:
        """Submit in pieces: a single long row as a pipeline, anything else as it is."""
        self.log.check(hidden, rows, ops)
        if len(rows) != 1 or rows[0].count <= PREFILL_POSITIONS:
            return [await self._submit(hidden, rows, ops, want)]
        parts = []
        whole = rows[0]
        for offset in range(0, whole.count, PREFILL_POSITIONS):
            count = min(PREFILL_POSITIONS, whole.count - offset)
            last = offset + count == whole.count
            piece = RowSlice(whole.row, whole.start + offset, count)
            wanted: Want = want if want == "all" or last else "none"
            parts.append(await self._submit(hidden[offset : offset + count], (piece,), () if offset else ops, wanted))
        return parts

    async def _submit(self, hidden: torch.Tensor, rows: tuple[RowSlice, ...], ops: Sequence[Op], want: Want) -> Pending:
        while len(self.log.pending) >= self._max_steps:
            await self._changed.park()
        pending = self.log.add(hidden, rows, ops, want, self._epoch)
        if self._ready:
            self._send(pending)
        else:
            self._alarm.set()
        return pending

    @property
    def _max_steps(self) -> int:
        return self._chain.max_steps if self._chain is not None else self._terms.max_steps

    @property
    def _epoch(self) -> int:
        return self._chain.epoch if self._chain is not None else 0

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
            if message.epoch == self._epoch:
                self._fault(control, LinkFailed(message.message))
        elif isinstance(message, Gap):
            # Its cache is not what we think it is: only a new chain is sure to agree with us.
            self._whole = False
            self._fault(control, Evicted(f"{control.hop.peer_id} has only {message.have}"))
        else:
            raise RemoteProtocolError(f"{message.TYPE} in the middle of a session")

    def _on_output(self, control: ControlStream, output: Output, body: memoryview) -> None:
        if output.epoch != self._epoch or output.seq not in self.log.pending:
            return
        self.log.answer(output, body, self._width)
        self._finder.succeeded(control.hop.peer_id)
        self._changed.unpark_all()

    def _on_failure(self, control: ControlStream, failure: Failure) -> None:
        error = failure.error
        if failure.seq is None or not isinstance(error, CallerError):
            self._fault(control, error)
        elif failure.seq in self.log.pending:
            # What was refused no other peer can mend; nor what was built on it.
            self.log.fail(error)
            self._changed.unpark_all()

    def _on_routed(self, routed: Routed) -> None:
        if routed.epoch == self._epoch:
            self.replayed_positions += routed.replayed
            self._routed_epoch = routed.epoch
            self._changed.unpark_all()

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
                self.log.fail(error)
                self._changed.unpark_all()

    async def _recover(self) -> None:
        """Get to a chain that stands where `retained` does, then send `pending` again."""
        failing_over = self._chain is not None
        faults, self._faults = self._faults, []
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
        for pending in list(self.log.pending.values()):
            self._send(pending)
        self._changed.unpark_all()

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
        if chain is None or not self.log.repeatable:
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
            found = await self._finder.find(dead.hop.span, tokens=self._terms.tokens, exclude=exclude)
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
            await self._replay(push_from=self.log.retained.lengths)
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
                await self._changed.park()
        return self._routed_epoch == chain.epoch

    async def _reopen(self, exclude: set[PeerId]) -> None:
        """Open a new chain and send it everything. Raises NoChain, Overloaded, CallerError, PeerFault."""
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
                found = await self._finder.find(self._blocks, tokens=self._terms.tokens, exclude=exclude)
                return await self._opener.open(found, self._terms)
            except NoChain:
                if waited >= self._patience.missing_s and not exclude:
                    raise
                exclude.clear()
            except HopRefused as refused:
                self._refused(refused, exclude)
                busy = isinstance(refused.error, Overloaded)
                if waited >= (self._patience.busy_s if busy else self._patience.missing_s):
                    raise refused.error from refused
            await trio.sleep(RETRY_S * self._rng.random())

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
            for step, hidden in replay_steps(self.log.retained, {}, push_from, self._chain.epoch):
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

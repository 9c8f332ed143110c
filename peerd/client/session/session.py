"""A client's session: takes rows of activations, step after step, and returns the results of the remote blocks.

The supervisor keeps the chain of hops that computes them. A long step is cut into pieces, so that the hops of a chain
work on them at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal

import torch
import trio

from peerd.client.finding.finder import Patience
from peerd.client.finding.served_by import ServedBy
from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.hops.draw_sender import DrawRequest
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.step_log import OnAnswer, Pending, StepLog
from peerd.client.session.supervisor import Supervisor
from peerd.protocol.encoding.tensors import DTYPES
from peerd.protocol.errors import InternalError, InvalidRequest, PeerdError
from peerd.protocol.messages.drawing import TokenPairs
from peerd.protocol.messages.session import Progress, Want
from peerd.protocol.rows import Op, RowSlice
from peerd.trio_tools import at_once

__all__ = ["Patience", "Sent", "Session"]


class Sent:
    """A step that was sent, or the pieces of a long one."""

    def __init__(self, parts: Sequence[Pending], want: Want) -> None:
        self._parts = parts
        self._want = want

    @property
    def is_done(self) -> bool:
        """Whether it was answered, or has failed."""
        return all(part.done.is_set() for part in self._parts)

    async def result(self) -> torch.Tensor:
        """Wait for what the step wants, `[positions, width]`. Raises the error with which the step ended."""
        for part in self._parts:
            await part.done.wait()
        results = [part.outcome() for part in self._parts]
        return torch.cat(results) if self._want == "all" and len(results) > 1 else results[-1]

    async def drawn_or_result(self) -> tuple[TokenPairs, ...] | torch.Tensor:
        """Wait for the tokens that the last hop drew; or for what the step wants, where it drew none."""
        result = await self.result()
        drawn = self._parts[-1].drawn
        return result if drawn is None else drawn


class Session:
    """Runs steps along a chain over the wanted blocks. `run` owns its tasks.

    `hidden` is `[positions, width]` on the CPU. Results have the session's wire dtype.
    """

    def __init__(self, tools: SessionTools, spec: SessionSpec) -> None:
        terms = spec.terms
        self.spec = spec
        self.log = StepLog(terms.size, on_received=tools.opener.connections.meters.received)
        self._supervisor = Supervisor(tools, spec, self.log)
        self._opener = tools.opener
        self._containment = tools.opener.connections.containment
        self._width = spec.width
        self._dtype = DTYPES[terms.dtype]
        self._closed = False
        self._on_rest: Callable[[], None] | None = None
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<Session {self._supervisor} {self.log}>"

    @property
    def chain(self) -> tuple[ServedBy, ...]:
        """Which peers serve which blocks now; empty before the first step."""
        return self._supervisor.chain.served_by

    @property
    def live(self) -> LiveChain | None:
        """The open chain; None while hops are missing."""
        chain = self._supervisor.chain
        return chain if chain.is_whole and not self._closed else None

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._closed

    @property
    def failovers(self) -> int:
        """How often hops were replaced after the first chain was complete."""
        return self._supervisor.failovers

    @property
    def replayed_positions(self) -> int:
        """How many positions were sent again, so that replacements catch up with the hops that they replace."""
        return self._supervisor.replayed_positions

    @property
    def reopened(self) -> int:
        """How often no hop of a chain could be kept, so that all hops had to compute the past again."""
        return self._supervisor.reopened

    async def how_far(self, timeout_s: float) -> list[tuple[ServedBy, Progress | None]]:
        """Ask each hop of the chain how far it is; None for a hop that does not answer within `timeout_s`."""
        chain, controls = self._supervisor.chain, self._supervisor.chain.controls

        async def ask(control: ControlStream) -> Progress | None:
            with trio.move_on_after(timeout_s), suppress(PeerdError, trio.ClosedResourceError):
                return await self._opener.ask(chain, control)
            return None

        answers = await at_once([partial(ask, control) for control in controls])
        return [(ServedBy(one.hop.peer_id, one.hop.span), said) for one, said in zip(controls, answers, strict=True)]

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the session's chain open until `close`. Steps that are pending then end with ClosedResourceError.

        A bug of ours ends this session alone; its steps end with InternalError.
        """
        error: Exception = trio.ClosedResourceError("the session was closed")
        try:
            with self._scope, self._containment.around("a session of this client"):
                await self._supervisor.run(task_status)
            if not self._closed:
                error = InternalError("a bug of this client ended the session")
        finally:
            self._closed = True
            self.log.fail(error)
            self._supervisor.changed.unpark_all()
            self.rest()

    def observe(self, on_answer: OnAnswer | None, on_rest: Callable[[], None]) -> None:
        """Call `on_answer` with each step that is answered and its result, until the session rests or ends; then call
        `on_rest` once, while its chain and log are as they were last.
        """
        self.log.observe(on_answer)
        self._on_rest = on_rest

    def rest(self) -> None:
        """Say that what the session was opened for is done. It may go on for something else."""
        self.log.observe(None)
        on_rest, self._on_rest = self._on_rest, None
        if on_rest is not None:
            on_rest()

    def close(self) -> None:
        """End the session on every hop."""
        self._closed = True
        self._scope.cancel()

    async def open(self) -> None:
        """Open a chain now instead of with the first step. Raises NoChain, Overloaded, CallerError."""
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
        """Run new positions and return the results that `want` names, `[positions, width]`.

        One `row` from position `start` (default: its end), where a longer row is cut; or several rows, as `rows`. A
        long step travels in pieces, on which the hops work at the same time. Raises InvalidRequest, ContextTooLong,
        NoChain, Overloaded, trio.ClosedResourceError. If this is cancelled, the positions may be cached or not: give
        `start` in the next call.
        """
        sent = await self.submit(hidden, row=row, start=start, rows=rows, ops=ops, want=want)
        return await sent.result()

    async def submit(
        self,
        hidden: torch.Tensor,
        *,
        row: int = 0,
        start: int | None = None,
        rows: Sequence[RowSlice] | None = None,
        ops: Sequence[Op] = (),
        want: Want = "last",
        draw: DrawRequest | None = None,
    ) -> Sent:
        """Send new positions as `step` does, or with a request as `draw` does, without waiting for results.

        Others may be sent behind them.

        If rows were cut behind what is still on its way, the answers to that come all the same, in order.
        """
        slices = self.log.slices(hidden, row, start, rows)
        return Sent(await self._submit_all(hidden, slices, ops, want, draw), want)

    async def draw(
        self,
        hidden: torch.Tensor,
        request: DrawRequest,
        *,
        row: int = 0,
        start: int | None = None,
        rows: Sequence[RowSlice] | None = None,
        ops: Sequence[Op] = (),
        want: Literal["last", "all"] = "last",
    ) -> tuple[TokenPairs, ...] | torch.Tensor:
        """Run new positions, as `step` does, and return a token for each that `want` names; or, where the last hop
        draws none, their results. With `all`, the positions must fit into one step.
        """
        sent = await self.submit(hidden, row=row, start=start, rows=rows, ops=ops, want=want, draw=request)
        return await sent.drawn_or_result()

    async def _submit_all(
        self,
        hidden: torch.Tensor,
        rows: tuple[RowSlice, ...],
        ops: Sequence[Op],
        want: Want,
        draw: DrawRequest | None = None,
    ) -> list[Pending]:
        """Submit one long row in pieces, as a pipeline, and anything else as one step."""
        if draw is None and want != "none" and self.spec.terms.head:
            raise InvalidRequest("this session's last hop draws tokens: ask for them with `draw`")
        if not hidden.isfinite().all():
            raise InvalidRequest("hidden has values that are not finite")
        self.log.check(hidden, rows, ops)
        if len(rows) != 1 or rows[0].count <= self._supervisor.step_positions:
            return [await self._submit(hidden, rows, ops, want, draw=draw)]
        parts: list[Pending] = []
        whole, offset = rows[0], 0
        while offset < whole.count:
            # What is submitted before a chain is open is cut as most hops want it.
            count = min(self._supervisor.step_positions, whole.count - offset)
            last = offset + count == whole.count
            piece = RowSlice(whole.row, whole.start + offset, count)
            wanted: Want = want if want == "all" or last else "none"
            part = hidden[offset : offset + count]
            own = draw if last else None
            parts.append(await self._submit(part, (piece,), () if offset else ops, wanted, parts, draw=own))
            offset += count
        return parts

    async def _submit(
        self,
        hidden: torch.Tensor,
        rows: tuple[RowSlice, ...],
        ops: Sequence[Op],
        want: Want,
        before: Sequence[Pending] = (),
        draw: DrawRequest | None = None,
    ) -> Pending:
        """Submit a step, or the next piece of one. If one of the pieces `before` it failed, raise that error."""
        while not self._closed and len(self.log.pending) >= self._supervisor.max_steps:
            await self._supervisor.changed.park()
        if self._closed:
            raise trio.ClosedResourceError("the session was closed")
        for piece in before:
            if piece.error is not None:
                raise piece.error
        pending = self.log.add(hidden, rows, ops, want, self._supervisor.epoch, draw)
        self._supervisor.submit(pending)
        return pending

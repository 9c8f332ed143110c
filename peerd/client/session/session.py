"""A client's session: rows of activations, one step after another, whoever serves them.

Knows steps and rows; the chain beneath, and its mending, is the supervisor's. A long step is cut into pieces
that the hops of a chain work on at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import trio

from peerd.client.finding.finder import Patience
from peerd.client.finding.served_by import ServedBy
from peerd.client.session.mender import Means, Wanted
from peerd.client.session.step_log import Pending, StepLog
from peerd.client.session.supervisor import Supervisor
from peerd.protocol.encoding.tensors import DTYPES
from peerd.protocol.errors import InternalError, InvalidRequest
from peerd.protocol.messages.session import Want
from peerd.protocol.rows import PREFILL_POSITIONS, Op, RowSlice

__all__ = ["Patience", "Session"]


class Session:
    """Runs steps along a chain over the wanted blocks. `run` owns its tasks.

    `hidden` is `[positions, width]`, on the CPU; what comes back has the session's wire dtype.
    """

    def __init__(self, means: Means, wanted: Wanted) -> None:
        terms = wanted.terms
        self.log = StepLog(terms.size)
        self._supervisor = Supervisor(means, wanted, self.log)
        self._width = wanted.width
        self._dtype = DTYPES[terms.dtype]
        self._closed = False
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<Session {self._supervisor} {self.log}>"

    @property
    def chain(self) -> tuple[ServedBy, ...]:
        """Who serves which blocks now; empty before the first step."""
        return self._supervisor.chain.served_by

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._closed

    @property
    def failovers(self) -> int:
        """How often hops were replaced, since there was a chain."""
        return self._supervisor.failovers

    @property
    def replayed_positions(self) -> int:
        """Positions that were sent again to bring replacements to where their predecessors stood."""
        return self._supervisor.replayed_positions

    @property
    def reopened(self) -> int:
        """How often no hop of a chain could be kept, so that all of them computed the past again."""
        return self._supervisor.reopened

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the session's chain open until `close`. Steps that are under way then end with ClosedResourceError."""
        try:
            with self._scope:
                await self._supervisor.run(task_status)
        finally:
            self._closed = True
            self.log.fail(trio.ClosedResourceError("the session was closed"))
            self._supervisor.changed.unpark_all()

    def close(self) -> None:
        """End the session on every hop."""
        self._closed = True
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
        ContextTooLong, NoChain, Overloaded, trio.ClosedResourceError. Cancelled, the positions may be cached
        or not: say `start` next time.
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
        if not hidden.isfinite().all():
            raise InvalidRequest("hidden has values that are not finite")
        self.log.check(hidden, rows, ops)
        if len(rows) != 1 or rows[0].count <= PREFILL_POSITIONS:
            return [await self._submit(hidden, rows, ops, want)]
        parts: list[Pending] = []
        whole = rows[0]
        for offset in range(0, whole.count, PREFILL_POSITIONS):
            count = min(PREFILL_POSITIONS, whole.count - offset)
            last = offset + count == whole.count
            piece = RowSlice(whole.row, whole.start + offset, count)
            wanted: Want = want if want == "all" or last else "none"
            part = hidden[offset : offset + count]
            parts.append(await self._submit(part, (piece,), () if offset else ops, wanted, parts))
        return parts

    async def _submit(
        self,
        hidden: torch.Tensor,
        rows: tuple[RowSlice, ...],
        ops: Sequence[Op],
        want: Want,
        before: Sequence[Pending] = (),
    ) -> Pending:
        """Submit a step, or the next piece of one; where those `before` it were given up, raises why."""
        while not self._closed and len(self.log.pending) >= self._supervisor.max_steps:
            await self._supervisor.changed.park()
        if self._closed:
            raise trio.ClosedResourceError("the session was closed")
        for piece in before:
            if piece.error is not None:
                raise piece.error
        pending = self.log.add(hidden, rows, ops, want, self._supervisor.epoch)
        self._supervisor.submit(pending)
        return pending

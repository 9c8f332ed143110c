"""One session in an engine: its rows, its queued steps, and the check whether a new step can follow them.

A row has three states: what is computed, what the running batch adds (its page table), and what the queued steps
will make of it (`queued`), against which a new step is checked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from peerd.compute.errors import ContextTooLongError, EngineError, InvalidStepError, StepGapError
from peerd.compute.kv.reserve import PageReserve
from peerd.compute.kv.row_cache import Retention, RowCache, RowState
from peerd.compute.steps import EngineStep, StateCopy, StepResult
from peerd.protocol.rows import DECODE_POSITIONS, Fork, Op, RowSlice, SessionSize
from peerd.protocol.span import Span


class QueuedStep:
    """A queued step: `taken` of its positions are in batches, and `parts` of its result are back.

    prepared: whether its rows were forked, dropped and cut; `state_copies` are what that needs on the device.
    """

    def __init__(self, step: EngineStep) -> None:
        self.step = step
        self.positions = step.positions
        self.prepared = False
        self.state_copies: list[StateCopy] = []
        self.taken = 0
        self.parts: list[torch.Tensor] = []

    @property
    def remaining(self) -> int:
        return self.positions - self.taken

    def slices(self, count: int) -> Iterator[RowSlice]:
        """The slices of rows that the next `count` positions cover."""
        first = 0
        for piece in self.step.rows:
            begin = max(self.taken - first, 0)
            end = min(self.taken + count - first, piece.count)
            if begin < end:
                yield RowSlice(piece.row, piece.start + begin, end - begin)
            first += piece.count

    def without_long_ends(self, count: int, room: int) -> int:
        """The next `count` positions, or fewer: so many that no row takes more than `room` in one go up to the end of
        its slice, or to less than `room` before it.

        Inputs of running states are logged for so many positions only, and a row can be cut within the last `room`.
        """
        first = 0
        for piece in self.step.rows:
            begin = max(self.taken - first, 0)
            end = min(self.taken + count - first, piece.count)
            if end - begin > room and end > piece.count - room:
                return first + piece.count - room - self.taken
            first += piece.count
        return count

    def succeed(self) -> StepResult:
        hidden = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        return StepResult(self.step.session, self.step.seq, hidden)

    def fail(self, error: EngineError) -> StepResult:
        return StepResult(self.step.session, self.step.seq, None, error)


@dataclass(slots=True, eq=False)
class EngineSession:
    """The engine's state of a session. `running`: a batch contains some of it.

    lacking: how many of the pool's pages its next positions need; 0 if that was not too many.
    """

    blocks: Span
    size: SessionSize
    reserve: PageReserve
    retention: Retention
    owner: Hashable = None
    weight: float = 1.0
    adapter: str = ""
    rows: dict[int, RowCache] = field(default_factory=dict)
    queued: dict[int, RowState] = field(default_factory=dict)
    queue: deque[QueuedStep] = field(default_factory=deque)
    held: bool = False
    running: bool = False
    closed: bool = False
    passed_over: int = 0
    lacking: int = 0

    @property
    def is_ready(self) -> bool:
        return self.wants_to_run and not self.is_short

    @property
    def is_short(self) -> bool:
        """Whether its next positions wait for pages."""
        return self.wants_to_run and self.lacking > self.reserve.unused_pages

    @property
    def wants_to_run(self) -> bool:
        return bool(self.queue) and not self.held

    @property
    def is_prefill(self) -> bool:
        """Whether the first queued step is a prompt rather than a decode."""
        return self.queue[0].positions > DECODE_POSITIONS

    def lengths(self) -> dict[int, int]:
        """Positions of each row that has any, including those that the running batch adds."""
        return {number: row.length for number, row in self.rows.items() if row.length}

    def row(self, number: int) -> RowCache:
        row = self.rows.get(number)
        if row is None:
            row = self.rows[number] = RowCache(self.reserve, number, self.retention)
        return row

    def states_after(self, step: EngineStep) -> dict[int, RowState]:
        """The rows after `step` has run behind all queued steps.

        Raises StepGapError, ContextTooLongError, InvalidStepError.
        """
        if len({piece.row for piece in step.rows}) < len(step.rows):
            raise InvalidStepError("a step names each row at most once")
        states = dict(self.queued)
        for op in step.ops:
            self._check_op(op, states)
        for piece in step.rows:
            state = states.get(piece.row, RowState())
            self._check_slice(piece, state)
            states[piece.row] = self.retention.after(state, piece.start, piece.end)
        return states

    def is_continued_by(self, step: EngineStep) -> bool:
        """Whether the step only adds to its rows, so that it can share a batch with the step before it.

        Where blocks have running states it cannot: it goes on from states that the batch computes.
        """
        if self.retention.has_states:
            return False
        return not step.ops and all(piece.start == self.row(piece.row).length for piece in step.rows)

    def prepare(self, queued: QueuedStep) -> None:
        """Fork, drop and cut rows as the step says, one after the other."""
        queued.prepared = True
        for op in queued.step.ops:
            if isinstance(op, Fork):
                queued.state_copies += self.row(op.target).become(self.row(op.source), op.length)
            else:
                self.row(op.row).cut(0)
        for piece in queued.step.rows:
            self.row(piece.row).cut(piece.start)

    def that_fits(self, queued: QueuedStep, count: int) -> int:
        """The next `count` positions of a step that was prepared, or as many of them as there are pages for."""
        unused = self.reserve.unused_pages
        if count and self._pages_for(queued, count) > unused:
            count = bisect_right(range(1, count), unused, key=lambda some: self._pages_for(queued, some))
        self.lacking = 0 if count or not queued.remaining else self._pages_for(queued, 1)
        return count

    def _pages_for(self, queued: QueuedStep, count: int) -> int:
        return sum(self.row(piece.row).pages_to_grow(piece.count) for piece in queued.slices(count))

    def undo(self, failed: QueuedStep) -> None:
        """Cut a failed step's rows where it began, and drop the rest of the step.

        A row that was forked is lost if its running states were not copied: it has those of neither row now.
        """
        for piece in failed.step.rows:
            self.row(piece.row).cut(piece.start)
        lost = {copy.target for copy in failed.state_copies if not copy.done}
        for row in self.rows.values():
            if row.state_home in lost:
                row.cut(0)
        if self.queue and self.queue[0] is failed:
            self.queue.popleft()

    def fail_queued(self, error: EngineError) -> list[StepResult]:
        """Fail all queued steps, because they build on a step that failed."""
        results = [queued.fail(error) for queued in self.queue]
        self.queue.clear()
        self.lacking = 0
        self.settle()
        self.queued = {number: row.state for number, row in self.rows.items() if row.length}
        return results

    def settle(self) -> None:
        """After a batch has ended, give back pages that no row needs any more."""
        if not self.retention.keeps_everything:
            for row in self.rows.values():
                row.settle()

    def _check_op(self, op: Op, states: dict[int, RowState]) -> None:
        """Check one op against `states` and apply it there."""
        if not isinstance(op, Fork):
            self._check_row(op.row)
            states.pop(op.row, None)
            return
        self._check_row(op.source)
        self._check_row(op.target)
        if op.length < 0:
            raise InvalidStepError(f"a fork of {op.length} positions")
        source = states.get(op.source, RowState())
        if op.length > source.length:
            raise self._gap(f"row {op.source} has not the {op.length} positions to fork")
        if not self.retention.allows_cut(source, op.length):
            # Not a gap: if the client sent the row again from the start, it would only come to the same point.
            raise InvalidStepError(
                f"row {op.source} of {source.length} positions cannot be forked at {op.length}: blocks with a window"
                f" forgot what that sees; fork at {source.floor} or later, or open with a larger max_rollback"
            )
        states[op.target] = RowState(op.length, source.floor if op.length else 0)

    def _check_slice(self, piece: RowSlice, state: RowState) -> None:
        self._check_row(piece.row)
        if piece.start < 0 or piece.count < 1:
            raise InvalidStepError(f"a slice has at least one position, from 0 on, not {piece}")
        if piece.start > state.length:
            raise self._gap(f"row {piece.row} has {state.length} positions, not {piece.start}")
        if not self.retention.allows_cut(state, piece.start):
            message = f"row {piece.row} of {state.length} positions cannot be cut at {piece.start}: windows have moved"
            raise self._gap(message, {piece.row: 0})
        if piece.end > self.size.max_length:
            raise ContextTooLongError(f"position {piece.end} of the {self.size.max_length} that were committed")

    def _gap(self, message: str, lost: Mapping[int, int] = MappingProxyType({})) -> StepGapError:
        lengths = {row: state.length for row, state in self.queued.items()}
        return StepGapError(message, lengths | dict(lost))

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.size.max_rows:
            raise InvalidStepError(f"row {row} of a session with {self.size.max_rows}")

"""One session in an engine: its rows, the steps that wait, and whether a new step can follow them.

Three states of a row differ: what is computed, what the running batch will add (its page table), and
what the queued steps will make of it (`queued`), against which a new step is checked. Knows pages by
table only; knows neither other sessions nor batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch

from peerd.compute.engine_errors import ContextTooLongError, EngineError, InvalidStepError, StepGapError
from peerd.compute.pages import PageReserve, PageTable
from peerd.compute.steps import EngineStep, StepResult
from peerd.protocol.rows import Fork, Op, RowSlice
from peerd.protocol.span import Span

# A step of at most this many positions is somebody waiting for a token; more is a prefill.
DECODE_POSITIONS = 32


class QueuedStep:
    """A step on its way: `taken` of its positions are in batches, and `parts` of its result are back."""

    def __init__(self, step: EngineStep) -> None:
        self.step = step
        self.positions = step.positions
        self.taken = 0
        self.parts: list[torch.Tensor] = []

    @property
    def remaining(self) -> int:
        return self.positions - self.taken

    def slices(self, count: int) -> Iterator[RowSlice]:
        """What the next `count` positions add to which row."""
        first = 0
        for piece in self.step.rows:
            begin = max(self.taken - first, 0)
            end = min(self.taken + count - first, piece.count)
            if begin < end:
                yield RowSlice(piece.row, piece.start + begin, end - begin)
            first += piece.count

    def succeed(self) -> StepResult:
        hidden = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        return StepResult(self.step.session, self.step.seq, hidden)

    def fail(self, error: EngineError) -> StepResult:
        return StepResult(self.step.session, self.step.seq, None, error)


@dataclass(slots=True, eq=False)
class EngineSession:
    """What an engine knows of a session. `running` while a batch has some of it."""

    blocks: Span
    max_length: int
    max_rows: int
    reserve: PageReserve
    owner: Hashable = None
    adapter: str = ""
    tables: dict[int, PageTable] = field(default_factory=dict)
    queued: dict[int, int] = field(default_factory=dict)
    queue: deque[QueuedStep] = field(default_factory=deque)
    held: bool = False
    running: bool = False
    closed: bool = False
    passed_over: int = 0

    @property
    def is_ready(self) -> bool:
        return bool(self.queue) and not self.held

    @property
    def is_prefill(self) -> bool:
        """Whether what waits first is a prompt rather than somebody's next token."""
        return self.queue[0].positions > DECODE_POSITIONS

    def lengths(self) -> dict[int, int]:
        """Positions of each row that has any, the running batch's included."""
        return {row: table.length for row, table in self.tables.items() if table.length}

    def table(self, row: int) -> PageTable:
        table = self.tables.get(row)
        if table is None:
            table = self.tables[row] = PageTable(self.reserve, row)
        return table

    def lengths_after(self, step: EngineStep) -> dict[int, int]:
        """The rows' lengths once `step` has run after all that is queued.

        Raises StepGapError, ContextTooLongError, InvalidStepError.
        """
        if len({piece.row for piece in step.rows}) < len(step.rows):
            raise InvalidStepError("a step names each row at most once")
        lengths = dict(self.queued)
        for op in step.ops:
            self._check_op(op, lengths)
        for piece in step.rows:
            self._check_slice(piece, lengths.get(piece.row, 0))
            lengths[piece.row] = piece.end
        return lengths

    def is_continued_by(self, step: EngineStep) -> bool:
        """Whether the step only adds to its rows, and so can share a batch with the one before it."""
        return not step.ops and all(piece.start == self.table(piece.row).length for piece in step.rows)

    def apply(self, ops: tuple[Op, ...]) -> None:
        """Fork and drop rows, one after the other."""
        for op in ops:
            if isinstance(op, Fork):
                self.table(op.target).become(self.table(op.source), op.length)
            else:
                self.table(op.row).cut(0)

    def undo(self, failed: QueuedStep) -> None:
        """Cut a failed step's rows where it began, and forget what is left of it."""
        for piece in failed.step.rows:
            self.table(piece.row).cut(piece.start)
        if self.queue and self.queue[0] is failed:
            self.queue.popleft()

    def fail_queued(self, error: EngineError) -> list[StepResult]:
        """Fail all that waits: it built on a step that failed."""
        results = [queued.fail(error) for queued in self.queue]
        self.queue.clear()
        self.queued = self.lengths()
        return results

    def _check_op(self, op: Op, lengths: dict[int, int]) -> None:
        """Check one op against `lengths` and apply it there."""
        if not isinstance(op, Fork):
            self._check_row(op.row)
            lengths.pop(op.row, None)
            return
        self._check_row(op.source)
        self._check_row(op.target)
        if op.length < 0:
            raise InvalidStepError(f"a fork of {op.length} positions")
        if op.length > lengths.get(op.source, 0):
            raise StepGapError(f"row {op.source} has not the {op.length} positions to fork", dict(self.queued))
        lengths[op.target] = op.length

    def _check_slice(self, piece: RowSlice, length: int) -> None:
        self._check_row(piece.row)
        if piece.start < 0 or piece.count < 1:
            raise InvalidStepError(f"a slice has at least one position, from 0 on, not {piece}")
        if piece.start > length:
            raise StepGapError(f"row {piece.row} has {length} positions, not {piece.start}", dict(self.queued))
        if piece.end > self.max_length:
            raise ContextTooLongError(f"position {piece.end} of the {self.max_length} that were committed")

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.max_rows:
            raise InvalidStepError(f"row {row} of a session with {self.max_rows}")

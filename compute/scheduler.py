"""Which positions run next: sessions, their queues, and the packing of batches. Pure; no arithmetic.

Knows rows, pages and a budget; never looks into a tensor. Runs on the main thread alone. The
difficulty is that three states of a row differ: what is computed, what the running batch will add
(its page table), and what the queued steps will make of it (`queued`), against which a new step is
checked. Forks, drops and rollbacks change a page table only when a batch takes their step, and only
as the first of its session in that batch, so a page copied before the batch is never stale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch

from peerd.compute.engine_errors import (
    ContextTooLongError,
    InvalidStepError,
    NonFiniteError,
    StepGapError,
)
from peerd.compute.pages import PagePool, PageReserve, PageTable
from peerd.compute.steps import Batch, BatchOutput, EngineStep, PageCopy, Piece, Segment, StepResult
from peerd.protocol.rows import Fork, RowSlice
from peerd.protocol.span import Span

# A step of at most this many positions is somebody waiting for a token; more is a prefill.
DECODE_POSITIONS = 32
# Beside decodes, prefills get this part of the budget: whoever waits for a token waits for them too. On a CPU
# 64 positions a batch cost 7 % more than 256 do (SmolLM2-135M), and end a quarter as late.
PREFILL_SHARE = 4
# A ready session that was left out of this many batches goes before all others.
MAX_PASSED_OVER = 4


@dataclass(slots=True, eq=False)
class _Queued:
    """A step on its way: `taken` of its positions are in batches, and `parts` are back."""

    step: EngineStep
    taken: int = 0
    parts: list[torch.Tensor] = field(default_factory=list)

    positions: int = field(init=False)

    def __post_init__(self) -> None:
        self.positions = self.step.positions

    @property
    def remaining(self) -> int:
        return self.positions - self.taken

    @property
    def is_taken(self) -> bool:
        return self.taken == self.positions


@dataclass(slots=True, eq=False)
class _Session:
    blocks: Span
    max_length: int
    max_rows: int
    reserve: PageReserve
    tables: dict[int, PageTable] = field(default_factory=dict)
    queued: dict[int, int] = field(default_factory=dict)
    queue: deque[_Queued] = field(default_factory=deque)
    held: bool = False
    running: bool = False
    closed: bool = False
    passed_over: int = 0

    @property
    def is_ready(self) -> bool:
        return bool(self.queue) and not self.held

    @property
    def is_prefill(self) -> bool:
        return self.queue[0].positions > DECODE_POSITIONS

    def lengths(self) -> dict[int, int]:
        return {row: table.length for row, table in self.tables.items() if table.length}


class Scheduler:
    """The sessions of one engine, in the order in which their turn comes."""

    def __init__(self, span: Span, hidden_size: int, pool: PagePool, batch_tokens: int) -> None:
        self.span = span
        self.hidden_size = hidden_size
        self.pool = pool
        self.batch_tokens = batch_tokens
        self._sessions: dict[Hashable, _Session] = {}
        self._running: list[tuple[_Session, _Queued]] | None = None

    def __repr__(self) -> str:
        queued = sum(len(session.queue) for session in self._sessions.values())
        return f"<Scheduler {self.span} sessions={len(self._sessions)} queued={queued} {self.pool!r}>"

    # Sessions.

    def tokens_wanted(self, max_length: int, max_rows: int) -> int:
        """KV tokens that such a session commits: each row in whole pages."""
        return max_rows * self.pool.pages_for(max_length) * self.pool.page_tokens

    def open(self, name: Hashable, blocks: Span, max_length: int, max_rows: int, max_rollback: int) -> None:
        if name in self._sessions:
            raise ValueError(f"session {name!r} is open")
        if not self.span.covers(blocks):
            raise InvalidStepError(f"blocks {blocks} are not within {self.span}")
        if max_length < 1 or max_rows < 1 or max_rollback < 0:
            raise InvalidStepError(f"not a session: {max_rows} rows of {max_length} positions, {max_rollback} back")
        total = self.pool.pages * self.pool.page_tokens
        if self.tokens_wanted(max_length, max_rows) > total:
            raise ContextTooLongError(f"{max_rows} rows of {max_length} positions exceed this peer's {total} KV tokens")
        reserve = self.pool.reserve(max_rows, self.pool.pages_for(max_length))
        self._sessions[name] = _Session(blocks, max_length, max_rows, reserve)

    def close(self, name: Hashable) -> None:
        session = self._sessions.pop(name)
        session.closed = True
        session.queue.clear()
        # The device thread may be writing to its pages: `collect` frees them.
        if not session.running:
            session.reserve.close()

    def lengths(self, name: Hashable) -> dict[int, int]:
        return self._sessions[name].lengths()

    def hold(self, name: Hashable, held: bool) -> None:
        self._sessions[name].held = held

    @property
    def is_ready(self) -> bool:
        return any(session.is_ready for session in self._sessions.values())

    # Steps.

    def check(self, step: EngineStep) -> dict[int, int]:
        """The rows' lengths once `step` has run after all that is queued. Raises what `Engine.check` raises."""
        session = self._sessions[step.session]
        if step.hidden.shape != (step.positions, self.hidden_size) or not step.hidden.is_floating_point():
            raise InvalidStepError(
                f"hidden states are floats of shape {(step.positions, self.hidden_size)}, "
                f"not {step.hidden.dtype} {tuple(step.hidden.shape)}"
            )
        if len({piece.row for piece in step.rows}) < len(step.rows):
            raise InvalidStepError("a step names each row at most once")
        lengths = dict(session.queued)
        _check_ops(session, step, lengths)
        for piece in step.rows:
            _check_slice(session, piece, lengths)
            lengths[piece.row] = piece.end
        return lengths

    def submit(self, step: EngineStep) -> None:
        lengths = self.check(step)
        session = self._sessions[step.session]
        session.queued = lengths
        session.queue.append(_Queued(step))

    # Batches.

    def plan(self) -> Batch | None:
        """The next batch, or None where no session is ready."""
        if self._running is not None:
            raise RuntimeError("the last batch has not been collected")
        turn = sorted(
            ((name, session) for name, session in self._sessions.items() if session.is_ready),
            key=lambda entry: (entry[1].passed_over < MAX_PASSED_OVER, entry[1].is_prefill),
        )
        if not turn:
            return None
        blocks = turn[0][1].blocks
        beside_decodes = any(session.blocks == blocks and not session.is_prefill for _, session in turn)
        share = max(self.batch_tokens // PREFILL_SHARE, 1) if beside_decodes else self.batch_tokens
        packing = _Packing(self.batch_tokens, share)
        for name, session in turn:
            if session.blocks == blocks and packing.take_from(session):
                session.passed_over = 0
                # Behind everybody else for the next turn.
                self._sessions[name] = self._sessions.pop(name)
            else:
                session.passed_over += 1
        self._running = packing.owners
        return Batch(blocks, tuple(packing.pieces), tuple(packing.copies))

    def collect(self, output: BatchOutput) -> list[StepResult]:
        """Take a batch's output back: results of the steps that it ended, in each session's order."""
        if self._running is None:
            raise RuntimeError("no batch was planned")
        results: list[StepResult] = []
        failed: dict[_Session, NonFiniteError] = {}
        for (session, queued), hidden, finite in zip(self._running, output.hidden, output.finite, strict=True):
            if session.closed:
                continue
            if not finite:
                failed.setdefault(session, NonFiniteError(f"step {queued.step.seq} has a result that is not finite"))
            if session in failed:
                _undo(session, queued)
                results.append(_failure(queued, failed[session]))
            else:
                queued.parts.append(hidden)
                if queued.is_taken:
                    results.append(_success(queued))
        for session, error in failed.items():
            results.extend(_failure(queued, error) for queued in session.queue)
            session.queue.clear()
            session.queued = session.lengths()
        self._end_turn()
        return results

    def _end_turn(self) -> None:
        for session in {session for session, _ in self._running or ()}:
            session.running = False
            if session.closed:
                session.reserve.close()
        self._running = None


class _Packing:
    """A batch in the making."""

    def __init__(self, budget: int, prefill_budget: int) -> None:
        self.pieces: list[Piece] = []
        self.copies: list[PageCopy] = []
        self.owners: list[tuple[_Session, _Queued]] = []
        self._budget = budget
        self._prefill_budget = prefill_budget

    def take_from(self, session: _Session) -> bool:
        """Take what the session may add to this batch and the budget allows. Returns whether anything was."""
        taken = False
        while session.queue:
            queued = session.queue[0]
            if taken and not _continues(session, queued.step):
                break
            budget = self._prefill_budget if session.is_prefill else self._budget
            if queued.remaining and not budget:
                break
            self._take(session, queued, min(budget, queued.remaining))
            taken = True
            if not queued.is_taken:
                break
            session.queue.popleft()
        session.running = session.running or taken
        return taken

    def _take(self, session: _Session, queued: _Queued, count: int) -> None:
        step, offset = queued.step, queued.taken
        if offset == 0:
            _apply_ops(session, step)
        segments = tuple(self._segment(session, part) for part in _parts(step, offset, count))
        self.pieces.append(Piece(step, offset, count, segments))
        self.owners.append((session, queued))
        if session.is_prefill:
            self._prefill_budget -= count
        queued.taken += count
        self._budget -= count
        self._prefill_budget = min(self._prefill_budget, self._budget)

    def _segment(self, session: _Session, part: RowSlice) -> Segment:
        table = session.tables.get(part.row)
        if table is None:
            table = session.tables[part.row] = PageTable(session.reserve, part.row)
        table.cut(part.start)
        self.copies.extend(table.grow(part.count))
        return Segment(part.start, part.count, table.snapshot(), session.max_length)


def _parts(step: EngineStep, offset: int, count: int) -> Iterator[RowSlice]:
    """The slices that positions `offset` to `offset + count` of a step fall into."""
    first = 0
    for piece in step.rows:
        begin = max(offset - first, 0)
        end = min(offset + count - first, piece.count)
        if begin < end:
            yield RowSlice(piece.row, piece.start + begin, end - begin)
        first += piece.count


def _continues(session: _Session, step: EngineStep) -> bool:
    """Whether the step only adds to its rows, and so can share a batch with the one before it."""
    tables = session.tables
    return not step.ops and all(
        piece.start == (tables[piece.row].length if piece.row in tables else 0) for piece in step.rows
    )


def _apply_ops(session: _Session, step: EngineStep) -> None:
    for op in step.ops:
        if isinstance(op, Fork):
            target = session.tables.setdefault(op.target, PageTable(session.reserve, op.target))
            source = session.tables.get(op.source, target)
            target.become(source, op.length)
        elif op.row in session.tables:
            session.tables[op.row].cut(0)


def _check_ops(session: _Session, step: EngineStep, lengths: dict[int, int]) -> None:
    for op in step.ops:
        if isinstance(op, Fork):
            _check_row(session, op.source)
            _check_row(session, op.target)
            if op.length < 0:
                raise InvalidStepError(f"a fork of {op.length} positions")
            if op.length > lengths.get(op.source, 0):
                raise StepGapError(
                    f"row {op.source} is shorter than the {op.length} positions to fork", dict(session.queued)
                )
            lengths[op.target] = op.length
        else:
            _check_row(session, op.row)
            lengths.pop(op.row, None)


def _check_slice(session: _Session, piece: RowSlice, lengths: dict[int, int]) -> None:
    _check_row(session, piece.row)
    if piece.start < 0 or piece.count < 1:
        raise InvalidStepError(f"a slice has at least one position, from 0 on, not {piece}")
    if piece.start > lengths.get(piece.row, 0):
        raise StepGapError(
            f"row {piece.row} has {lengths.get(piece.row, 0)} positions, not {piece.start}", dict(session.queued)
        )
    if piece.end > session.max_length:
        raise ContextTooLongError(f"position {piece.end} of the {session.max_length} that were committed")


def _check_row(session: _Session, row: int) -> None:
    if not 0 <= row < session.max_rows:
        raise InvalidStepError(f"row {row} of a session with {session.max_rows}")


def _undo(session: _Session, queued: _Queued) -> None:
    """Cut a failed step's rows where it began, and forget what is left of it."""
    for piece in queued.step.rows:
        if piece.row in session.tables:
            session.tables[piece.row].cut(piece.start)
    if session.queue and session.queue[0] is queued:
        session.queue.popleft()


def _success(queued: _Queued) -> StepResult:
    parts = queued.parts
    hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
    return StepResult(queued.step.session, queued.step.seq, hidden)


def _failure(queued: _Queued, error: NonFiniteError) -> StepResult:
    return StepResult(queued.step.session, queued.step.seq, None, error)

"""Decides which positions run next: packs the steps of many sessions into batches. Pure; it computes no tensors.

Runs on the main thread only. Forks, drops and rollbacks change page tables while later steps wait. So each takes effect
only when a batch takes its step, and only as the first step of its session in that batch. Then a page that is copied
before the batch runs is never stale.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from peerd.compute.engine.fair_shares import FairShares
from peerd.compute.engine.packing import Packing
from peerd.compute.engine.session import EngineSession, QueuedStep
from peerd.compute.errors import BatchFailedError, ContextTooLongError, EngineError, InvalidStepError, NonFiniteError
from peerd.compute.kv.layout import Demand, KVLayout
from peerd.compute.kv.page_pool import PagePool
from peerd.compute.kv.reserve import PageReserve, expected_sets
from peerd.compute.kv.row_cache import Retention, RowState
from peerd.compute.steps import Batch, BatchOutput, EngineStep, StepResult
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span

if TYPE_CHECKING:
    import torch

# A ready session that was left out of this many batches, as a prefill beside decodes or for its blocks, goes first.
MAX_PASSED_OVER = 4
# The longest session that a client may request (spec/sessions/session.md): if all blocks have windows, any length fits.
LONGEST_SESSION = 1 << 24


_Entry = tuple[Hashable, EngineSession]


def _like(entry: _Entry) -> tuple[Span, bool]:
    """Sessions that compete for the same batches."""
    return entry[1].blocks, entry[1].is_prefill


class Scheduler:
    """The sessions of one engine. Each owner gets its share (`fair_shares`), however many sessions it has."""

    def __init__(self, span: Span, hidden_size: int, layout: KVLayout, pool: PagePool, batch_tokens: int) -> None:
        self._span = span
        self._layout = layout
        self._hidden_size = hidden_size
        self._pool = pool
        self._batch_tokens = batch_tokens
        # Among the sessions of an owner, the first is the one whose last turn was longest ago.
        self._sessions: dict[Hashable, EngineSession] = {}
        self._shares = FairShares()
        self._running: list[tuple[EngineSession, QueuedStep]] | None = None
        #: The dtype in which the blocks compute, for errors; None if it was not given.
        self.dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        queued = sum(len(session.queue) for session in self._sessions.values())
        return f"<Scheduler {self._span} sessions={len(self._sessions)} queued={queued} {self._pool!r}>"

    def tokens_wanted(self, size: SessionSize) -> int:
        """KV tokens that such a session is expected to need when it opens, in whole sets of pages."""
        sets = expected_sets(size.max_rows, self._demands(size), self._pool.groups, self._begins_with(size))
        return sets * self._pool.page_tokens

    def tokens_of(self, name: Hashable) -> int:
        """KV tokens that an open session is expected to need."""
        return self._sessions[name].reserve.tokens

    def _begins_with(self, size: SessionSize) -> int | None:
        """How many pages the texts take with which a session's rows begin; None if it does not say."""
        if not size.prompt_length:
            return None
        demands = self._demands(replace(size, max_length=min(size.prompt_length, size.max_length)))
        return size.max_rows * sum(each.groups * each.pages_per_row for each in demands if not each.keep.running)

    @property
    def free_length(self) -> int:
        """The longest row with which a session of one row could open now."""
        lengths = range(1, LONGEST_SESSION + 1)
        return bisect_right(lengths, self._pool.free_tokens, key=lambda length: self.tokens_wanted(SessionSize(length)))

    def _demands(self, size: SessionSize) -> tuple[Demand, ...]:
        return self._layout.demands(size.max_length, size.max_rollback, self._batch_tokens, self._pool.page_tokens)

    def open(
        self,
        name: Hashable,
        size: SessionSize,
        *,
        blocks: Span,
        owner: Hashable = None,
        weight: float = 1.0,
        adapter: str = "",
    ) -> None:
        if name in self._sessions:
            raise ValueError(f"session {name!r} is open")
        if not self._span.covers(blocks):
            raise InvalidStepError(f"blocks {blocks} are not within {self._span}")
        if size.max_length < 1 or size.max_rows < 1 or size.max_rollback < 0:
            raise InvalidStepError(f"not a session: {size}")
        demands = self._demands(size)
        total = self._pool.total_tokens
        if self._layout.sets_wanted(demands, size.max_rows) * self._pool.page_tokens > total:
            raise ContextTooLongError(
                f"{size.max_rows} rows of {size.max_length} positions exceed this peer's {total} KV tokens: ask for"
                " fewer rows or positions at once"
            )
        reserve = PageReserve(self._pool, size.max_rows, demands, self._begins_with(size))
        retention = Retention(demands, size.max_rollback)
        self._sessions[name] = EngineSession(blocks, size, reserve, retention, owner, weight, adapter)

    def close(self, name: Hashable) -> None:
        session = self._sessions.pop(name)
        session.closed = True
        session.queue.clear()
        if all(other.owner != session.owner for other in self._sessions.values()):
            self._shares.leave(session.owner)
        # The device thread may be writing to its pages: `collect` frees them.
        if not session.running:
            session.reserve.close()

    def use_adapter(self, name: Hashable, adapter: str) -> None:
        session = self._sessions[name]
        if session.queue or session.rows:
            raise InvalidStepError("a session's adapter is chosen before its first step")
        session.adapter = adapter

    def uses_adapter(self, adapter: str) -> bool:
        return any(session.adapter == adapter for session in self._sessions.values())

    def lengths(self, name: Hashable) -> dict[int, int]:
        return self._sessions[name].lengths()

    def cut_lengths(self, name: Hashable) -> dict[int, int]:
        """The lengths of rows that were cut for a step which waits for pages. None if the step forks rows too, which
        have to be forked before they are cut.
        """
        session = self._sessions[name]
        first = session.queue[0]
        return {} if first.step.ops else {piece.row: session.row(piece.row).length for piece in first.step.rows}

    def hold(self, name: Hashable, held: bool) -> None:
        self._sessions[name].held = held

    @property
    def is_ready(self) -> bool:
        return any(session.is_ready for session in self._sessions.values())

    @property
    def short(self) -> list[Hashable]:
        """The sessions whose next positions wait for pages."""
        return [name for name, session in self._sessions.items() if session.is_short]

    @property
    def missing_pages(self) -> int:
        """How many pages must become free until all these sessions can run, beside those of sessions that have closed
        and are still in the running batch.
        """
        short = [session for session in self._sessions.values() if session.is_short]
        leaving = {session for session, _ in self._running or () if session.closed}
        soon = self._pool.free_pages + sum(session.reserve.used_pages for session in leaving)
        return sum(session.lacking for session in short) - soon if short else 0

    def pages_of(self, name: Hashable) -> int:
        """How many of the pool's pages a session has."""
        return self._sessions[name].reserve.used_pages

    def check(self, step: EngineStep) -> dict[int, RowState]:
        """The rows after `step`, once it has run behind all queued steps. Raises what `Engine.check` raises."""
        session = self._sessions[step.session]
        wanted = (step.positions, self._hidden_size)
        if step.hidden.shape != wanted or not step.hidden.is_floating_point():
            got = f"{step.hidden.dtype} {tuple(step.hidden.shape)}"
            raise InvalidStepError(f"hidden states are floats of shape {wanted}, not {got}")
        return session.states_after(step)

    def submit(self, step: EngineStep) -> None:
        states = self.check(step)
        session = self._sessions[step.session]
        session.queued = states
        session.queue.append(QueuedStep(step))

    def plan(self) -> Batch | None:
        """The next batch, or None if no session is ready."""
        if self._running is not None:
            raise RuntimeError("the last batch has not been collected")
        while ready := [(name, session) for name, session in self._sessions.items() if session.is_ready]:
            batch = self._packed(ready)
            # If there are no pages for any of the batch, these sessions wait, and perhaps others can run.
            if batch.pieces:
                return batch
        return None

    def _packed(self, ready: Sequence[_Entry]) -> Batch:
        self._shares.begin_turn({session.owner for _, session in ready})
        decodes = [entry for entry in ready if not entry[1].is_prefill]
        prefills = [entry for entry in ready if entry[1].is_prefill]
        leader = self._leader(decodes, prefills)
        blocks = leader[1].blocks
        packing = Packing(self._batch_tokens, any(session.blocks == blocks for _, session in decodes))
        for name, session in chain((leader,), self._in_order(decodes), self._in_order(prefills)):
            if session.blocks == blocks and not session.running:
                left = packing.budget
                if packing.take_from(session):
                    self._shares.charge(session.owner, left - packing.budget, session.weight)
                    # Put the session behind its owner's others for the next turn.
                    self._sessions[name] = self._sessions.pop(name)
        for _, session in ready:
            session.passed_over = 0 if session.running else session.passed_over + 1
        self._running = packing.owners or None
        return Batch(blocks, tuple(packing.pieces), tuple(packing.copies))

    def _leader(self, decodes: Sequence[_Entry], prefills: Sequence[_Entry]) -> _Entry:
        """Choose the session that goes first and so determines the batch's blocks: a decode, unless another session has
        waited too long.
        """
        first = next(self._in_order(decodes or prefills))
        overdue = [entry for entry in (*decodes, *prefills) if entry[1].passed_over >= MAX_PASSED_OVER]
        # A session with the same blocks and kind as `first` gets into the batch by taking turns, so only others may go
        # before it.
        others = [entry for entry in overdue if _like(entry) != _like(first)]
        return next(self._in_order(others), first)

    def _in_order(self, entries: Sequence[_Entry]) -> Iterator[_Entry]:
        by_owner: dict[Hashable, list[_Entry]] = {}
        for entry in entries:
            by_owner.setdefault(entry[1].owner, []).append(entry)
        return self._shares.in_order(by_owner)

    def collect(self, output: BatchOutput) -> list[StepResult]:
        """Process a batch's output. Returns the results of the steps that it ended, in each session's order."""
        if self._running is None:
            raise RuntimeError("no batch was planned")
        results: list[StepResult] = []
        failed: dict[EngineSession, EngineError] = {}
        replayed = output.replayed or (0,) * len(output.hidden)
        for (session, queued), hidden, finite, again in zip(
            self._running, output.hidden, output.finite, replayed, strict=True
        ):
            if session.closed:
                continue
            if again:
                self._shares.charge(session.owner, again, session.weight)
            if hidden is None:
                failed.setdefault(session, BatchFailedError(f"blocks {session.blocks} could not be computed here"))
            elif not finite:
                failed.setdefault(session, NonFiniteError.of(session.blocks, self.dtype))
            if hidden is None or session in failed:
                session.undo(queued)
                results.append(queued.fail(failed[session]))
                continue
            queued.parts.append(hidden)
            if not queued.remaining:
                results.append(queued.succeed())
        for session, error in failed.items():
            results.extend(session.fail_queued(error))
        self._end_turn()
        return results

    def _end_turn(self) -> None:
        for session in {session for session, _ in self._running or ()}:
            session.running = False
            if session.closed:
                session.reserve.close()
            else:
                session.settle()
        self._running = None

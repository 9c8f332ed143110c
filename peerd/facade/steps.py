"""Steps of a `RemoteCache`: opens, fills and steps its sessions, and replaces those that became too small.

A step changes the cache only when all runs of a forward have answered, so a forward that failed or was interrupted can
simply be repeated.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from peerd.facade.backend import AnySession, Backend
from peerd.facade.blocks import Call
from peerd.facade.cache import RemoteCache, Run, settle
from peerd.facade.lora import Pairs, as_adapter, states
from peerd.facade.passes import check_alone, prompts_of
from peerd.protocol.errors import ContextTooLong, InvalidRequest
from peerd.protocol.messages.session import MAX_ROWS, Want
from peerd.protocol.rows import Op, RowSlice
from peerd.protocol.span import Span
from peerd.trio_tools import at_once

# Several rows with at most this many positions travel in one step. More go row by row, so that hops work in parallel.
TOGETHER = 512
# How many positions more than it needs now a session gets if the caller did not say how long it will become.
ROOM = 256
# The least rollback of a replaced session: assisted generation takes candidates back that far.
ROLLBACK = 64

Piece = tuple[RowSlice, torch.Tensor]


def run_step(
    backend: Backend, call: Call, cache: RemoteCache, span: Span, hidden: torch.Tensor, lora: Pairs
) -> torch.Tensor:
    """Run new columns `[rows, columns, width]` through `span`; padding columns of the result are zeros."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise RuntimeError("a cache has no gradients: call with use_cache=False, or under torch.no_grad()")
    if not cache.lock.acquire(blocking=False):
        raise RuntimeError("another thread is using this cache: give each thread a cache of its own")
    try:
        return _Step(backend, call, cache, span, hidden).run(lora)
    finally:
        cache.lock.release()


def finish_run(call: Call, cache: RemoteCache, mask: torch.Tensor | None, rows: int, columns: int) -> None:
    """Note that a run of the forward has answered. Once all have, the cache has the new columns."""
    call.answered += 1
    if call.answered == len(call.runs):
        cache.note(mask, rows, columns)


def new_mask(call: Call, rows: int, columns: int) -> torch.Tensor | None:
    """Which of the new columns are real, bool `[rows, columns]`; None: all of them."""
    mask = None if call.mask is None else call.mask[:, -columns:].cpu().expand(rows, -1)
    return None if mask is None or bool(mask.all()) else mask


class _Step:
    """One step of one run. `past` and `counts`: each row's real positions before the new columns, and in them.

    `prefix`: what stands before each row in its session and not in the batch: trained prompts, or space for keys and
    values.
    """

    def __init__(self, backend: Backend, call: Call, cache: RemoteCache, span: Span, hidden: torch.Tensor) -> None:
        self._backend, self._call, self._cache, self._span, self._hidden = backend, call, cache, span, hidden
        self._rows, self._columns, self._width = hidden.shape
        if cache.columns and self._rows != cache.rows:
            raise ValueError(f"{self._rows} rows, where the cache has {cache.rows}")
        self._mask = new_mask(call, self._rows, self._columns)
        self._past = cache.lengths() if cache.computed else [0] * self._rows
        counts = [self._columns] * self._rows if self._mask is None else self._mask.sum(1).tolist()
        self._counts = [int(count) for count in counts]
        prefix, deep = prompts_of(backend, call, span)
        if cache.prefix is not None:
            check_alone(prefix)
            prefix = cache.prefix.space(self._width)
        self._prefixes = {} if cache.prefix is None else cache.prefix.within(span)
        self._prefix = None if prefix is None else prefix.detach().to("cpu", backend.dtype)
        self._extra = 0 if self._prefix is None else len(self._prefix)
        self._deep = None if deep is None else deep[:, 0]
        prompts = backend.prompts if prefix is not None and cache.prefix is None else None
        self._prompt_states = [] if prompts is None else prompts.states()

    def run(self, lora: Pairs) -> torch.Tensor:
        shift = _checked_shift(self._call, self._cache, self._mask, self._past, self._rows, self._columns)
        wire = self._hidden.detach().to("cpu", self._backend.dtype)
        run = self._ready_run(wire, lora)
        if self._cache.computed:
            held = run.session.log.lengths
            targets, ops = settle(run.sources, [self._start(past) for past in self._past], list(held), run.max_rows)
        else:
            targets, ops = list(run.sources), []
        pieces, piece_of = self._pieces(wire, targets)
        only_last = self._last_only or (self._columns == 1 and not self._extra)
        want: Want = "last" if only_last else "all"
        answers = self._backend.bridge.call(_ask, run.session, pieces, ops, want)
        self._backend.steps += 1
        run.sources = targets
        self._cache.shift = shift
        output = self._spread(answers, targets, piece_of)
        finish_run(self._call, self._cache, self._mask, self._rows, self._columns)
        return output.to(self._hidden.device, self._hidden.dtype)

    @property
    def _last_only(self) -> bool:
        """Whether nothing but the last column's logits is needed: those of each row's last real position, even where
        padding stands on the right.
        """
        return self._call.last_only and self._call.is_last

    def _start(self, past: int) -> int:
        """Where a row's new positions begin in its session: after the prompts, if it has any."""
        return past + self._extra if past else 0

    def _ready_run(self, wire: torch.Tensor, lora: Pairs) -> Run:
        """The run's session, old or new, and large enough for this step."""
        cache, key = self._cache, self._call.run_key
        run = cache.runs.get(key)
        if run is None:
            if cache.computed and key not in cache.inputs:
                known = ", ".join(str(span) for _, span in cache.runs)
                raise ValueError(
                    f"this cache was filled by runs of blocks {known}, not by {self._span}: begin a new cache"
                )
            run = self._open(cache.computed + self._columns + self._extra, lora)
            run.sources = _distinct(wire, self._mask)
            if key in cache.inputs:
                self._fill(run, cache.inputs[key].to("cpu", self._backend.dtype))
                del cache.inputs[key]
            # Only now: if the servers failed to fill it, the cache is unchanged, and the session becomes garbage.
            cache.runs[key] = run
        elif not cache.computed:
            run.sources = _distinct(wire, self._mask)
        elif run.states != states(run.lora) + self._prompt_states:
            raise ValueError("the adapter or prompts have changed since this cache was opened: begin a new cache")
        self._make_room(run)
        return run

    def _open(self, columns: int, lora: Pairs) -> Run:
        wanted = self._cache.max_length or columns + ROOM
        prompts = self._backend.prompts
        length = min(self._backend.max_length, wanted + (prompts.length if prompts is not None else 0))
        length = max(columns, length)
        rollback = min(self._cache.max_rollback, length)
        return self._start_run(length, self._rows, rollback, lora, prompt=columns)

    def _start_run(self, length: int, rows: int, rollback: int, lora: Pairs, *, prompt: int) -> Run:
        if rows > MAX_ROWS:
            raise InvalidRequest(f"{rows} rows at once, a session has at most {MAX_ROWS}: generate in several calls")
        backend = self._backend
        start: Any = partial(
            backend.blocks.start_session,
            max_length=length,
            max_rows=rows,
            max_rollback=rollback,
            prompt_length=prompt,
            blocks=self._span,
            adapter=as_adapter(lora, self._span.start, self._deep, self._prefixes),
        )
        session: AnySession = backend.bridge.call(start)
        backend.sessions_opened += 1
        run = Run(
            self._span, session, length, rows, rollback, prompt, lora, states(lora) + self._prompt_states, session.close
        )
        _close_with(run, backend)
        return run

    def _fill(self, run: Run, wire: torch.Tensor) -> None:
        """Send the columns that a lazy cache stands for to its new session."""
        mask = self._cache.mask
        run.sources = _distinct(wire, mask)
        pieces: dict[int, Piece] = {}
        for index, source in enumerate(run.sources):
            if self._past[index] and source not in pieces:
                part = wire[index] if mask is None else wire[index][mask[index]]
                part = part if self._prefix is None else torch.cat((self._prefix, part))
                pieces[source] = (RowSlice(source, 0, len(part)), part)
        self._backend.bridge.call(_ask, run.session, list(pieces.values()), (), "none")

    def _make_room(self, run: Run) -> None:
        """Replace a session that is too short, too narrow or cannot be cut far enough; its positions are computed
        again.
        """
        log = run.session.log
        starts = [self._start(past) for past in self._past]
        end = max(past + count + self._extra for past, count in zip(self._past, self._counts, strict=True))
        cut = max((log.length(row) - start for row, start in zip(run.sources, starts, strict=True)), default=0)
        fits = end <= run.max_length and self._rows <= run.max_rows and cut <= run.max_rollback
        if end > self._backend.max_length:
            name, most = self._backend.blocks.facts.name, self._backend.max_length
            raise ContextTooLong(f"{end} positions with those in the cache, {name} takes {most}: begin a new cache")
        if fits and not run.session.closed:
            return
        length = min(self._backend.max_length, max(end, 2 * run.max_length if end > run.max_length else run.max_length))
        copies = {row: log.sent(row, start) for row, start in zip(run.sources, starts, strict=True) if start}
        rows, rollback = max(self._rows, run.max_rows), max(run.max_rollback, cut, ROLLBACK)
        bigger = self._start_run(length, rows, min(rollback, length), run.lora, prompt=run.prompt_length)
        self._backend.bridge.call(_refill, bigger.session, copies)
        run.close()
        run.session, run.max_length, run.max_rows = bigger.session, length, rows
        run.max_rollback = bigger.max_rollback
        # The finalizer of `bigger` would close the session that `run` has now.
        _forget(bigger)
        _close_with(run, self._backend)

    def _pieces(self, wire: torch.Tensor, targets: Sequence[int]) -> tuple[list[Piece], dict[int, int]]:
        """The pieces to send, and for each session row the piece with its answer; equal rows are sent once."""
        pieces: list[Piece] = []
        piece_of: dict[int, int] = {}
        for index, (target, past, count) in enumerate(zip(targets, self._past, self._counts, strict=True)):
            if not count or target in piece_of:
                continue
            piece_of[target] = len(pieces)
            part = wire[index] if self._mask is None else wire[index][self._mask[index]]
            if self._prefix is not None and not past:
                part = torch.cat((self._prefix, part))
            pieces.append((RowSlice(target, self._start(past), len(part)), part))
        return pieces, piece_of

    def _spread(
        self, answers: Sequence[torch.Tensor], targets: Sequence[int], piece_of: dict[int, int]
    ) -> torch.Tensor:
        """Put the answers of rows into columns, `[rows, columns, width]`."""
        output = torch.zeros(self._rows, self._columns, self._width, dtype=self._backend.dtype)
        for index, (target, count) in enumerate(zip(targets, self._counts, strict=True)):
            if not count:
                continue
            found = answers[piece_of[target]][-count:]
            if self._last_only:
                output[index, -1] = found[-1]
            elif self._mask is None:
                output[index, self._columns - len(found) :] = found
            else:
                real = self._mask[index].nonzero()[:, 0]
                output[index, real[len(real) - len(found) :]] = found
        return output


def _close_with(run: Run, backend: Backend) -> None:
    """Close the run's session when the run is garbage, so that the servers' memory is freed whatever the program
    does.
    """
    finalizer = weakref.finalize(run, backend.bridge.post, run.session.close)
    finalizer.atexit = False
    run.close = finalizer


def _forget(run: Run) -> None:
    """Undo `_close_with`."""
    finalizer = run.close
    assert isinstance(finalizer, weakref.finalize)
    finalizer.detach()


def _distinct(wire: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    """A session row for each row of the batch, the same for neighbours that are equal (beams of one prompt)."""
    sources = [0]
    for index in range(1, len(wire)):
        same = torch.equal(wire[index], wire[index - 1])
        same = same and (mask is None or torch.equal(mask[index], mask[index - 1]))
        sources.append(sources[-1] if same else index)
    return sources


def _checked_shift(
    call: Call, cache: RemoteCache, mask: torch.Tensor | None, past: Sequence[int], rows: int, columns: int
) -> torch.Tensor | None:
    """The cache's `shift` after this step. Raises ValueError for position ids with gaps."""
    if call.positions is None:
        return cache.shift
    positions = call.positions.expand(rows, -1)[:, -columns:].cpu()
    real = torch.ones(rows, columns, dtype=torch.bool) if mask is None else mask
    offset = positions - (torch.tensor(past)[:, None] + real.cumsum(1) - 1)
    least = offset.masked_fill(~real, 1 << 40).amin(1)
    if bool((offset.masked_fill(~real, -(1 << 40)).amax(1) > least).any()):
        raise ValueError("position_ids with gaps: servers count the positions of a row themselves; leave them out")
    has_real = real.any(1)
    known = torch.full((rows,), -1) if cache.shift is None else cache.shift
    shift = torch.where((known < 0) & has_real, least, known)
    if bool((has_real & (shift != least)).any()):
        raise ValueError("position_ids do not continue those of the cached positions")
    return shift


async def _refill(session: AnySession, copies: dict[int, torch.Tensor]) -> None:
    """Compute rows again in another session."""
    try:
        await at_once([partial(session.step, part, row=row, start=0, want="none") for row, part in copies.items()])
    except BaseException:
        session.close()
        raise


async def _ask(session: AnySession, pieces: Sequence[Piece], ops: Sequence[Op], want: Want) -> list[torch.Tensor]:
    """Each piece's answer, `[positions, width]`; none for `want="none"`."""
    if not pieces:
        return []
    total = sum(piece.count for piece, _ in pieces)
    if len(pieces) == 1 or total <= TOGETHER:
        hidden = pieces[0][1] if len(pieces) == 1 else torch.cat([part for _, part in pieces])
        answer = await session.step(hidden, rows=[piece for piece, _ in pieces], ops=ops, want=want)
        if want == "none":
            return []
        return list(torch.split(answer, [1 if want == "last" else piece.count for piece, _ in pieces]))
    if ops:
        await session.step(pieces[0][1][:0], rows=(), ops=ops, want="none")
    return await at_once([partial(session.step, part, rows=[piece], want=want) for piece, part in pieces])

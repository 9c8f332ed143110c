"""An engine whose blocks llama.cpp computes. Sessions, batches and KV accounting are those of every engine here.

The scheduler's pages only count: llama.cpp has a cell for each position of the pool, and finds a free one itself. Rows
of a session that share pages share cells, so llama.cpp never needs more cells than the rows hold pages.

It keeps no adapters, and has no gradients: sessions that need these are refused and go to other servers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from peerd.compute.adapters.lora import Lora
from peerd.compute.engine.engine import BaseEngine
from peerd.compute.errors import AdapterError
from peerd.compute.kv.layout import BATCH_TOKENS, EVERYTHING, PAGE_TOKENS, group
from peerd.compute.llamacpp.sequences import Cut, Sequences, slices_of
from peerd.compute.llamacpp.span_model import Array, LlamaSpan
from peerd.compute.llamacpp.structs import MAX_SEQUENCES
from peerd.compute.steps import Batch, BatchOutput, Piece, StepResult
from peerd.protocol.rows import Drop, Fork, Op, SessionSize
from peerd.protocol.span import Span

# The sequence of `forward`, which no session gets.
_SCRATCH = 0


def cells_for(kv_tokens: int, batch_tokens: int = BATCH_TOKENS) -> int:
    """The cells of a cache for `kv_tokens` positions of sessions, and those of `forward`."""
    return kv_tokens + batch_tokens


@dataclass(slots=True)
class _Planned:
    """What the device thread needs to know of a batch beside the batch: nothing here changes while it runs.

    sequences: of each session in it, by row. cuts: what to forget first. prepared: whether that is done.
    """

    sequences: dict[Hashable, tuple[int, ...]]
    cuts: tuple[Cut, ...]
    prepared: bool = False


@dataclass(slots=True)
class _Rows:
    """New positions for llama.cpp, of many pieces."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)


class LlamaEngine(BaseEngine):
    """An engine over a loaded span, whose cache has `cells_for(kv_tokens)` cells. Results are in fp32.

    Raises ValueError if the pool has no page.
    """

    def __init__(self, model: LlamaSpan, *, kv_tokens: int, page_tokens: int = PAGE_TOKENS) -> None:
        super().__init__(
            model.span,
            model.width,
            group([EVERYTHING] * len(model.span)),
            kv_tokens=kv_tokens,
            page_tokens=page_tokens,
            batch_tokens=model.batch,
        )
        self._scheduler.dtype = torch.float32
        self._model = model
        self._sequences = Sequences(MAX_SEQUENCES, first=_SCRATCH + 1)
        self._planned: _Planned | None = None

    def tokens_wanted(self, size: SessionSize) -> int:
        """As `BaseEngine.tokens_wanted`, but at least the part of the pool that the rows take of the sequences.

        So who holds most of the sequences, with rows of a few positions, counts as who holds most of the pool.
        """
        return max(super().tokens_wanted(size), self._sequences.share_of(self.total_tokens, size.max_rows))

    def tokens_of(self, session: Hashable) -> int:
        rows = len(self._sequences.of(session))
        return max(super().tokens_of(session), self._sequences.share_of(self.total_tokens, rows))

    def open(
        self,
        session: Hashable,
        size: SessionSize,
        *,
        blocks: Span | None = None,
        owner: Hashable = None,
        weight: float = 1.0,
        adapter: str = "",
    ) -> None:
        """As `BaseEngine.open`; NoRoomError also if sessions have all of llama.cpp's sequences, one for each row."""
        self._sequences.check_room(size.max_rows, self.free_tokens)
        super().open(session, size, blocks=blocks, owner=owner, weight=weight, adapter=adapter)
        self._sequences.open(session, size.max_rows)

    def close(self, session: Hashable) -> None:
        super().close(session)
        planned = self._planned
        self._sequences.close(session, running=planned is not None and session in planned.sequences)

    def plan(self) -> Batch | None:
        batch = super().plan()
        if batch is not None:
            # Rows that were cut for a step which waits for pages: others have the pages, and need the cells.
            for session in self.short:
                self._sequences.shorten(session, self._scheduler.cut_lengths(session))
            sessions = {piece.step.session for piece in batch.pieces}
            sequences = {session: self._sequences.of(session) for session in sessions}
            self._planned = _Planned(sequences, self._sequences.take_cuts())
        return batch

    def collect(self, batch: Batch, output: BatchOutput) -> list[StepResult]:
        for piece, hidden, finite in zip(batch.pieces, output.hidden, output.finite, strict=True):
            if hidden is None or not finite:
                self._sequences.cut(piece.step.session, piece.step.rows)
        self._planned = None
        self._sequences.end_batch()
        return super().collect(batch, output)

    def run(self, batch: Batch) -> BatchOutput:
        planned = self._planned
        assert planned is not None, "a batch is planned before it runs"
        if not planned.prepared:
            self._prepare(planned, batch.pieces)
        rows, good = _Rows(), _good_pieces(batch.pieces)
        for piece, is_good in zip(batch.pieces, good, strict=True):
            if is_good:
                self._add(rows, piece, planned.sequences[piece.step.session])
        output = iter(torch.split(self._compute(rows, batch.blocks), [len(part) for part in rows.hidden]))
        # Cloned, so that what a session keeps is not as large as the batch.
        hidden = tuple(
            next(output).clone() if is_good else torch.zeros(piece.count, self.hidden_size)
            for piece, is_good in zip(batch.pieces, good, strict=True)
        )
        finite = (is_good and bool(part.isfinite().all()) for part, is_good in zip(hidden, good, strict=True))
        return BatchOutput(hidden, tuple(finite))

    def forward(self, hidden: torch.Tensor, blocks: Span | None = None) -> torch.Tensor:
        """As `BaseEngine.forward`, of at most as many positions as a batch may have (ValueError)."""
        return torch.stack([self._forward(sequence, blocks or self.span) for sequence in hidden])

    @property
    def adapters(self) -> frozenset[str]:
        return frozenset()

    def load_adapter(self, name: str, lora: Lora) -> None:
        raise AdapterError(f"adapter {name}: llama.cpp runs none; serve with --engine torch")

    def unload_adapter(self, name: str) -> None:
        raise AdapterError(f"adapter {name} is not loaded")

    def _forward(self, hidden: torch.Tensor, blocks: Span) -> torch.Tensor:
        count = len(hidden)
        try:
            output = self._model.run(_array(hidden), range(count), [_SCRATCH] * count, blocks)
        finally:
            self._model.cut(_SCRATCH)
        return torch.from_numpy(output)

    def _prepare(self, planned: _Planned, pieces: Sequence[Piece]) -> None:
        """Fork and cut rows as the batch's steps say. Only once: a batch that fails is run again in parts."""
        planned.prepared = True
        for cut in planned.cuts:
            self._model.cut(cut.sequence, cut.length)
        for piece in pieces:
            if piece.offset == 0:
                for op in piece.step.ops:
                    self._apply(op, planned.sequences[piece.step.session])

    def _apply(self, op: Op, sequences: Sequence[int]) -> None:
        if isinstance(op, Fork):
            self._model.fork(sequences[op.source], sequences[op.target], op.length)
        else:
            assert isinstance(op, Drop)
            self._model.cut(sequences[op.row])

    def _add(self, rows: _Rows, piece: Piece, sequences: Sequence[int]) -> None:
        rows.hidden.append(piece.step.hidden[piece.offset : piece.offset + piece.count])
        for row in slices_of(piece):
            # A row that was rolled back, or whose last step failed, still has what follows.
            self._model.cut(sequences[row.row], row.start)
            rows.positions += range(row.start, row.start + row.count)
            rows.sequences += [sequences[row.row]] * row.count

    def _compute(self, rows: _Rows, blocks: Span) -> torch.Tensor:
        if not rows.positions:
            return torch.empty(0, self.hidden_size)
        hidden = torch.cat([part.float() for part in rows.hidden])
        return torch.from_numpy(self._model.run(_array(hidden), rows.positions, rows.sequences, blocks))


def _array(hidden: torch.Tensor) -> Array:
    return np.ascontiguousarray(hidden.float().numpy())


def _good_pieces(pieces: Sequence[Piece]) -> list[bool]:
    """Whether each piece can be computed: not if its input, or that of its session before it, is not finite.

    In llama.cpp's attention over many positions, a key that is not a number reaches rows that do not see it.
    """
    bad = set[Hashable]()
    good = []
    for piece in pieces:
        new = piece.step.hidden[piece.offset : piece.offset + piece.count]
        if not new.isfinite().all():
            bad.add(piece.step.session)
        good.append(piece.step.session not in bad)
    return good

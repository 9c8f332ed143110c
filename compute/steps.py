"""What goes into an engine and comes out: steps, results, and the batches between them.

These are plain values. A batch is a snapshot with everything that the device thread reads, so the main thread may
accept steps while the batch runs, without a lock.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from peerd.compute.errors import EngineError
from peerd.protocol.rows import Op, RowSlice
from peerd.protocol.span import Span


@dataclass(frozen=True, slots=True, eq=False)
class EngineStep:
    """New positions of some rows of one session, added after `ops` were applied.

    `hidden`: `[sum of the rows' counts, hidden_size]`, any floating dtype, on the CPU, in the order of `rows`.
    """

    session: Hashable
    seq: int
    ops: tuple[Op, ...]
    rows: tuple[RowSlice, ...]
    hidden: torch.Tensor

    @property
    def positions(self) -> int:
        return sum(piece.count for piece in self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """The result of a step: `hidden` with the step's shape, or the error that concerns this session alone."""

    session: Hashable
    seq: int
    hidden: torch.Tensor | None
    error: EngineError | None = None


@dataclass(frozen=True, slots=True)
class RowPages:
    """Where a row lies in one group of blocks: `pages` in order; the first slot holds position `first`.

    `pages` is a `range` if they lie side by side, so that the cache can be read as one view.
    """

    first: int
    pages: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class StateHome:
    """Where a row of a session keeps its running states, as long as the session lives: `pages` of the pool.

    room: how many positions from its end the row can certainly be cut.
    """

    pages: Sequence[int]
    room: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive new positions of one row in a batch.

    groups: for each group of blocks (`KVLayout`), where the row lies: from the first position that the blocks keep,
        or see from here, to the last position of this segment.
    prompt_length: the length of the text that the session began with (`SessionSize`).
    adapter: the LoRA weights that the session asked for beside the span's own; "" for none.
    state: where the row keeps running states, if the span has blocks with some. floor: the length below which the row
        will not be cut any more, except to 0.
    """

    start: int
    count: int
    groups: Sequence[RowPages]
    prompt_length: int
    adapter: str = ""
    state: StateHome | None = None
    floor: int = 0

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def rope_lengths(self) -> list[int]:
        """For each new position the length by which ropes that follow a text's length turn it."""
        return [max(self.prompt_length, position + 1) for position in range(self.start, self.end)]


@dataclass(slots=True, eq=False)
class StateCopy:
    """Copy a row's running states to another row before the batch runs. `done`: they were copied.

    If a batch fails and runs again, the source may have gone on meanwhile, so a copy is made once only.
    """

    source: StateHome
    target: StateHome
    done: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The part of a step that a batch runs: `count` positions from the step's `offset` on.

    state_copies: the copies of running states that the step needs first, in order.
    """

    step: EngineStep
    offset: int
    count: int
    segments: tuple[Segment, ...]
    state_copies: tuple[StateCopy, ...] = ()


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy a whole page before the batch runs: two rows shared it and one is about to write."""

    source: int
    target: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One turn of the engine: pieces of many sessions' steps, run through the same blocks."""

    blocks: Span
    pieces: tuple[Piece, ...]
    copies: tuple[PageCopy, ...]

    @property
    def positions(self) -> int:
        return sum(piece.count for piece in self.pieces)


@dataclass(frozen=True, slots=True, eq=False)
class BatchOutput:
    """For each piece its hidden states, `[count, hidden_size]` on the CPU, and whether all values are finite.

    A piece that could not be computed has no hidden states; `failures` are the stacks of the exceptions, as text.
    `is_device_lost`: whether the device cannot compute for this process any more.
    `replayed`: for each piece how many positions before its own went through the blocks' mixers once more, because its
    rows had been cut; empty if none did.
    """

    hidden: tuple[torch.Tensor | None, ...]
    finite: tuple[bool, ...]
    failures: tuple[str, ...] = ()
    is_device_lost: bool = False
    replayed: tuple[int, ...] = ()

"""Keeps what came back in one session, so that other servers can compute it again afterwards.

A client gets results only for the positions that it asks for: of a prompt mostly the last one, and then each token.
What was sent is in the session's own log. Of a session with several rows, one row is audited, but the results of all
are kept: a row may become a copy of another one, as in a beam search, and then it has that row's results. A row that
ends before the others leaves the session's log, so what was sent of it is copied at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch

from peerd.compute.audits.distance import FIRST_POSITION
from peerd.exchange.step_tensors import wanted_rows
from peerd.protocol.messages.session import Step
from peerd.protocol.rows import Fork, RowSlice

# More results of a row than this make no verdict surer, and take memory: 4 MB at a width of 8192 in bfloat16.
MAX_RESULTS = 256
# What is kept of all rows together.
MAX_RESULTS_OF_ALL = 4 * MAX_RESULTS

Sent = Callable[[int, int], torch.Tensor]
"""A copy of a row's first so many hidden states as they were sent, `[end, width]`; fewer if there are no more."""


@dataclass(frozen=True, slots=True, eq=False)
class RowText:
    """One row: inputs `[length, width]`, and results `[len(positions), width]` for these positions, in order.

    The inputs are empty if they were too many to copy.
    """

    inputs: torch.Tensor
    positions: tuple[int, ...]
    results: torch.Tensor


class Transcript:
    """The results of a session's rows, of which one will be audited. `sent` says what was sent of a row.

    rng: draws the row from those that there are; None takes row 0.
    max_bytes: of a row that takes more, the inputs are not copied: those of a long text would take gigabytes.
    """

    def __init__(self, sent: Sent, max_bytes: int, rng: Random | None = None) -> None:
        self._row = 0
        self._rng = rng
        self._seen: set[int] = set()
        self._sent = sent
        self._max_bytes = max_bytes
        self._rows: dict[int, dict[int, torch.Tensor]] = {}
        self._noted = 0
        self._ended: RowText | None = None

    def __repr__(self) -> str:
        return f"<Transcript of row {self._row}, {len(self.positions)} positions>"

    @property
    def positions(self) -> Sequence[int]:
        """The positions of the row whose results are kept, in order. Empty once the row has ended."""
        return sorted(self._rows.get(self._row, ()))

    def text(self) -> RowText | None:
        """The row as it is, or as it was when it ended; None if nothing came back."""
        return self._text() or self._ended

    def note(self, step: Step, result: torch.Tensor) -> None:
        """Note the answer to a step, `[wanted positions, width]`, before the step changes the session's log. Later
        results of a position replace earlier ones.
        """
        for op in step.ops:
            if isinstance(op, Fork):
                self._draw(op.target)
                source = self._rows.get(op.source, {})
                self._rows[op.target] = {at: kept for at, kept in source.items() if at < op.length}
            else:
                self._end(op.row)
        for piece in step.rows:
            self._draw(piece.row)
            row = self._rows.get(piece.row, {})
            self._rows[piece.row] = {at: kept for at, kept in row.items() if at < piece.start}
        offset = 0
        for piece in wanted_rows(step):
            self._keep(piece, result[offset : offset + piece.count])
            offset += piece.count

    def _draw(self, row: int) -> None:
        """Let chance choose between a row that is new and that which was chosen: in the end each was as likely."""
        if row in self._seen:
            return
        self._seen.add(row)
        if self._rng is not None and self._rng.randrange(len(self._seen)) == 0:
            self._row, self._ended = row, None

    def _keep(self, piece: RowSlice, result: torch.Tensor) -> None:
        row = self._rows[piece.row]
        for number in range(piece.count):
            at = piece.start + number
            if at >= FIRST_POSITION and len(row) < MAX_RESULTS and self._noted < MAX_RESULTS_OF_ALL:
                # A row of a large tensor would keep all of it in memory.
                row[at] = result[number].clone()
                self._noted += 1

    def _end(self, row: int) -> None:
        if row == self._row:
            self._ended = self._text() or self._ended
        self._rows.pop(row, None)

    def _text(self) -> RowText | None:
        positions = tuple(self.positions)
        if not positions:
            return None
        results = torch.stack([self._rows[self._row][position] for position in positions])
        length = positions[-1] + 1
        fits = results[0].nbytes * (length + len(positions)) <= self._max_bytes
        return RowText(self._sent(self._row, length if fits else 0), positions, results)

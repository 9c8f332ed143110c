"""Keeps what came back in one session, so that other servers can compute it again afterwards.

A client gets results only for the positions that it asks for: of a prompt mostly the last one, and then each token.
They are kept for one row. What was sent is in the session's own log.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peerd.compute.audits.distance import FIRST_POSITION
from peerd.exchange.step_tensors import wanted_rows
from peerd.protocol.messages.session import Step
from peerd.protocol.rows import Fork

# The row that is checked: the first answer of several, or the only one.
ROW = 0
# More results than this make no verdict surer, and take memory: 4 MB at a width of 8192 in bfloat16.
MAX_RESULTS = 256


class Transcript:
    """The results of one row, by position."""

    def __init__(self) -> None:
        self._results: dict[int, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"<Transcript of {len(self._results)} positions>"

    def __len__(self) -> int:
        return len(self._results)

    @property
    def positions(self) -> Sequence[int]:
        """The positions whose results are kept, in order."""
        return sorted(self._results)

    @property
    def results(self) -> torch.Tensor:
        """Their results, `[positions, width]`."""
        return torch.stack([self._results[position] for position in self.positions])

    def note(self, step: Step, result: torch.Tensor) -> None:
        """Note the answer to a step, `[wanted positions, width]`. Later results of a position replace earlier ones."""
        if any((op.target if isinstance(op, Fork) else op.row) == ROW for op in step.ops):
            # The row is another one now.
            self._results.clear()
        for piece in step.rows:
            if piece.row == ROW:
                self._results = {at: kept for at, kept in self._results.items() if at < piece.start}
        offset = 0
        for piece in wanted_rows(step):
            if piece.row == ROW:
                for number in range(piece.count):
                    at = piece.start + number
                    if at >= FIRST_POSITION and len(self._results) < MAX_RESULTS:
                        # A row of a large tensor would keep all of it in memory.
                        self._results[at] = result[offset + number].clone()
            offset += piece.count

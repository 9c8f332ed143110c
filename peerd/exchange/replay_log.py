"""Keeps what one sender has sent in a session, as far as it may have to be sent again.

The log has two parts: `row_buffers`, the rows as they are after all steps up to `folded`, which every hop downstream
has taken; and the later steps, in order. A hop that receives both, one after the other, has the sender's state, forks
and rollbacks included. A hop that has taken some of these steps needs only the ones that follow. Rows change while they
are being sent, so a sender pins them for that time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from peerd.exchange.row_buffers import RowBuffers
from peerd.protocol.messages.session import REPLAY_SEQ, Step
from peerd.protocol.rows import PREFILL_POSITIONS, RowSlice

Sent = tuple[Step, torch.Tensor]


class AlreadyFolded(Exception):
    """The receiver lacks steps that were already folded into the rows, so they cannot be sent as steps."""


class ReplayLog:
    """Activations of rows of at most `max_length` positions, `[positions, width]` a step.

    If the steps together exceed `max_positions`, the oldest are folded, even though a hop may still ask for them.
    """

    def __init__(self, max_length: int, max_positions: int | None = None) -> None:
        self.row_buffers = RowBuffers(max_length)
        self._max_positions = max_positions
        self.folded = 0
        self._recent: deque[Sent] = deque()
        self._fold_to = 0
        self._pins = 0

    def __repr__(self) -> str:
        return f"<ReplayLog {self.row_buffers} to {self.folded}, {[step.seq for step, _ in self._recent]}>"

    def add(self, step: Step, hidden: torch.Tensor) -> None:
        """Keep the next step. The positions of a replay go to the rows at once."""
        if step.seq == REPLAY_SEQ:
            self.row_buffers.add(step.rows, hidden)
            return
        self._recent.append((step, _own(hidden)))
        if self._max_positions is not None:
            excess = sum(step.positions for step, _ in self._recent) - self._max_positions
            for old, _ in list(self._recent)[:-1]:
                if excess <= 0:
                    break
                excess -= old.positions
                self.fold(old.seq)

    def fold(self, seq: int) -> None:
        """Fold the steps up to `seq`, which no hop will ask for again, into the rows: now, or when the last pin is
        released.
        """
        self._fold_to = max(self._fold_to, seq)
        while not self._pins and self._recent and self._recent[0][0].seq <= self._fold_to:
            step, hidden = self._recent.popleft()
            self.row_buffers.apply(step.ops)
            self.row_buffers.add(step.rows, hidden)
            self.folded = step.seq

    def forget_after(self, seq: int) -> None:
        """Forget the steps after `seq`, which were given up: they will not be sent again."""
        while self._recent and self._recent[-1][0].seq > seq:
            self._recent.pop()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Inside this context, rows do not change, except that replays may add to them."""
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1
            self.fold(self._fold_to)

    def since(self, taken: int, epoch: int) -> Iterator[Sent]:
        """What a receiver lacks that has taken the steps up to `taken` (0: none, and no complete replay).

        Iterate over it while pinned; steps that are added meanwhile are not included. A replay ends with a step without
        rows, whose number is that of the last step which the replay covers. Raises AlreadyFolded.
        """
        if 0 < taken < self.folded:
            raise AlreadyFolded(f"steps from {taken + 1} to {self.folded} are kept as rows only")
        recent = list(self._recent)
        if not taken:
            yield from replay_steps(self.row_buffers, epoch)
            if self.folded:
                yield Step(epoch=epoch, seq=self.folded, rows=(), want="none"), torch.empty((0, 0))
        for step, hidden in recent:
            if step.seq > taken:
                yield replace(step, epoch=epoch), hidden


def _own(hidden: torch.Tensor) -> torch.Tensor:
    """The same values in memory of their own: a slice of a batch would keep all of the batch in memory."""
    return hidden if hidden.untyped_storage().nbytes() == hidden.nbytes else hidden.clone()


def replay_steps(row_buffers: RowBuffers, epoch: int) -> Iterator[tuple[Step, torch.Tensor]]:
    """Steps that give a hop the current state of `row_buffers`, in pieces of a prefill's size.

    Rows may grow meanwhile; the positions that are added are not included.
    """
    for row, length in sorted(row_buffers.lengths.items()):
        for start in range(0, length, PREFILL_POSITIONS):
            end = min(start + PREFILL_POSITIONS, length)
            piece = RowSlice(row, start, end - start)
            yield Step(epoch=epoch, seq=REPLAY_SEQ, rows=(piece,), want="none"), row_buffers.copy(row, start, end)

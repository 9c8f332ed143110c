"""What one sender has sent in a session, as far as it may have to be sent again.

Knows steps by their numbers; knows no wire and no time. Two states are kept apart: `retained`, the rows after
all steps up to `folded`, which everybody behind us has taken; and the steps after that, in order. Whoever
takes both, one after the other, stands where we do, forks and rollbacks included, and whoever took some of those
steps already needs the others only. The difficulty is that rows change while they are sent: a pin holds them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from peerd.exchange.retained import Retained
from peerd.protocol.messages.session import REPLAY_SEQ, Step
from peerd.protocol.rows import PREFILL_POSITIONS, RowSlice

Sent = tuple[Step, torch.Tensor]


class KeptTooLittle(Exception):
    """Whoever asks lacks steps that were folded into the rows."""


class Kept:
    """Activations of rows of at most `max_length` positions, `[positions, width]` a step.

    Steps that have more than `max_positions` together are folded although somebody may ask for them.
    """

    def __init__(self, max_length: int, max_positions: int | None = None) -> None:
        self.retained = Retained(max_length)
        self._max_positions = max_positions
        self.folded = 0
        self._recent: deque[Sent] = deque()
        self._fold_to = 0
        self._pins = 0

    def __repr__(self) -> str:
        return f"<Kept {self.retained} to {self.folded}, {[step.seq for step, _ in self._recent]}>"

    def add(self, step: Step, hidden: torch.Tensor) -> None:
        """Keep the next step; a replay's positions go to the rows at once."""
        if step.seq == REPLAY_SEQ:
            self.retained.add(step.rows, hidden)
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
        """Steps up to `seq` will be asked for by nobody: now, or when the last pin is gone, rows take their place."""
        self._fold_to = max(self._fold_to, seq)
        while not self._pins and self._recent and self._recent[0][0].seq <= self._fold_to:
            step, hidden = self._recent.popleft()
            self.retained.apply(step.ops)
            self.retained.add(step.rows, hidden)
            self.folded = step.seq

    def forget_after(self, seq: int) -> None:
        """Steps after `seq` were given up: they will not be sent again."""
        while self._recent and self._recent[-1][0].seq > seq:
            self._recent.pop()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Hold the rows as they are, but for replays that only add to them."""
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1
            self.fold(self._fold_to)

    def since(self, taken: int, epoch: int) -> Iterator[Sent]:
        """What somebody lacks who took steps up to `taken` (0: none, and no replay to its end).

        To be iterated over while pinned; steps that are added meanwhile are not in it. A replay ends with a step
        without rows, numbered as the last that it holds. Raises KeptTooLittle.
        """
        if 0 < taken < self.folded:
            raise KeptTooLittle(f"steps from {taken + 1} to {self.folded} are kept as rows only")
        recent = list(self._recent)
        if not taken:
            yield from replay_steps(self.retained, epoch)
            if self.folded:
                yield Step(epoch=epoch, seq=self.folded, rows=(), want="none"), torch.empty((0, 0))
        for step, hidden in recent:
            if step.seq > taken:
                yield replace(step, epoch=epoch), hidden


def _own(hidden: torch.Tensor) -> torch.Tensor:
    """The same values in memory of their own: a slice of a batch would hold on to all of the batch."""
    return hidden if hidden.untyped_storage().nbytes() == hidden.nbytes else hidden.clone()


def replay_steps(retained: Retained, epoch: int) -> Iterator[tuple[Step, torch.Tensor]]:
    """Steps that bring a hop to where `retained` stands now, in pieces of a prefill's size.

    Rows may grow meanwhile: what is added later is not among them.
    """
    for row, length in sorted(retained.lengths.items()):
        for start in range(0, length, PREFILL_POSITIONS):
            end = min(start + PREFILL_POSITIONS, length)
            piece = RowSlice(row, start, end - start)
            yield Step(epoch=epoch, seq=REPLAY_SEQ, rows=(piece,), want="none"), retained.copy(row, start, end)

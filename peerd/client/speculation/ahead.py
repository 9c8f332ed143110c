"""Decides whether a window of guesses starts behind others that are not answered yet.

If all guesses before it are right, its tokens come with the next answer instead of a whole way through the chain later.
If one is wrong, the chain has computed it for nothing: the next step may wait for that, and so do others' sessions.
What both come to depends on the chain: where the way is long and the servers are many, the one is nearly everything and
the other nothing; with one server next door, it is the other way round. So both are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: The next window starts only where this is the least chance that it will count.
CONFIDENT: Final = 0.5
# A new measurement weighs this much. The first few weigh equally.
_WEIGHT = 0.2
# A time beyond this many plain steps was disturbed, and counts as this many.
_MOST = 3.0


class _Mean:
    def __init__(self, guess: float) -> None:
        self.value = guess
        self._count = 1

    def note(self, value: float) -> None:
        self._count += 1
        self.value += max(1 / self._count, _WEIGHT) * (min(value, _MOST) - self.value)


class AheadTimes:
    """What windows behind others gain and cost, in plain steps. The answers of a model share it."""

    def __init__(self) -> None:
        # How long after the window before it one is answered; and how much later a step is that follows on windows
        # which were given up. Before anything is measured, half of the way and a quarter of a step.
        self._behind = _Mean(0.5)
        self._delayed = _Mean(0.25)

    def note_behind(self, ratio: float) -> None:
        """A window that counted was answered so many plain steps after the one before it."""
        self._behind.note(ratio)

    def note_delayed(self, excess: float) -> None:
        """A step behind windows that were given up took so many plain steps longer than others of its size."""
        self._delayed.note(max(excess, 0.0))

    def worth(self, chances: Sequence[float], others: float, excess: float) -> float:
        """What a window with these guesses saves, in plain steps; it may be negative.

        chances: for each guess, the probability that it and all before it are right, those on their way included.
        others: how many tokens other sessions get from a step. excess: how much longer its positions make a step.
        """
        if not chances or chances[0] < CONFIDENT:
            return 0.0
        saved = chances[0] * (1 - self._behind.value)
        return saved - (1 - chances[0]) * (self._delayed.value + others * excess)

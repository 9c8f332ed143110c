"""How much longer a step takes that carries drafted positions, measured as it happens.

It depends on everything: the delay of the chain, the device and the load of each server, the client's head. So nothing
is assumed. Times are kept as ratios to a step of the same answer without drafts; these hold for all answers of a model
better than seconds do.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

#: A step of a client that waits for a token has at most 32 positions; at least one of them is no guess.
MOST_DRAFTED = 31
# Sizes are measured in classes: up to 1, 2, 4, ... drafted positions.
_CLASSES = (1, 2, 4, 8, 16, MOST_DRAFTED)
# A new measurement weighs this much. The first few weigh equally.
_WEIGHT = 0.2


@dataclass(slots=True)
class _Mean:
    drafted: float = 0.0
    ratio: float = 0.0
    count: int = 0

    def note(self, drafted: int, ratio: float) -> None:
        self.count += 1
        weight = max(1 / self.count, _WEIGHT)
        self.drafted += weight * (drafted - self.drafted)
        self.ratio += weight * (ratio - self.ratio)


class StepTimes:
    """The ratios by number of drafted positions. Pure: the caller has the clock."""

    def __init__(self) -> None:
        self._means = [_Mean() for _ in _CLASSES]

    def note(self, drafted: int, ratio: float) -> None:
        """A step with so many drafted positions took `ratio` times as long as one without."""
        self._means[bisect_left(_CLASSES, min(drafted, MOST_DRAFTED))].note(drafted, ratio)

    def doubt(self) -> None:
        """Forget what was measured long ago. Only the smallest size still counts, as much as one measurement."""
        is_smallest = True
        for mean in self._means:
            if mean.count:
                mean.count = int(is_smallest)
                is_smallest = False

    @property
    def known(self) -> int:
        """The largest number of drafted positions that was measured; 0 if none was."""
        return max((size for size, mean in zip(_CLASSES, self._means, strict=True) if mean.count), default=0)

    @property
    def allowed(self) -> int:
        """How many positions may be drafted next: twice as many as were measured, so that a surprise stays small."""
        return min(MOST_DRAFTED, max(1, 2 * self.known))

    def ratio(self, drafted: int) -> float:
        """The expected ratio for a number of drafted positions.

        It is interpolated between the measured sizes, and goes on beyond them as it rose between the last two.
        """
        low, slope = (0.0, 1.0), 0.0
        for mean in self._means:
            if not mean.count:
                continue
            # More positions cannot be cheaper: where noise says so, believe the smaller size.
            high = (mean.drafted, max(mean.ratio, low[1]))
            slope = (high[1] - low[1]) / (high[0] - low[0])
            if drafted <= high[0]:
                break
            low = high
        return low[1] + slope * (drafted - low[0])

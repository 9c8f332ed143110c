"""Cuts the rows of a training pass into micro-batches of rows with similar lengths.

The rows of one micro-batch are padded to its longest. No position sees a later one, so padding changes nothing
before it, and its gradient is zero. Padding is cheap if lengths are close, so rows are grouped by length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

# A row does not join a micro-batch if more than a quarter of its place would be padding.
_MOST_FILLING = 1 / 4


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rows of a pass. `rows`: their numbers; `lengths` and `offsets`: where they lie in the packed tensor."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def positions(self) -> int:
        """Positions with padding, which determine the cost."""
        return len(self.rows) * self.longest

    def gather(self, packed: torch.Tensor) -> torch.Tensor:
        """The rows of `[all positions, width]` as `[rows, longest, width]`, padded with zeros."""
        first, longest = self.offsets[0], self.longest
        if self._is_dense:
            return packed[first : first + self.positions].view(len(self.rows), longest, -1)
        filled = packed.new_zeros(len(self.rows), longest, packed.shape[-1])
        for row, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            filled[row, :length] = packed[offset : offset + length]
        return filled

    def scatter(self, filled: torch.Tensor, packed: torch.Tensor) -> None:
        """Write `[rows, longest, width]` back into `[all positions, width]`."""
        for row, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            packed[offset : offset + length] = filled[row, :length]

    @property
    def _is_dense(self) -> bool:
        longest = self.longest
        starts = range(self.offsets[0], self.offsets[0] + self.positions, longest)
        return all(length == longest for length in self.lengths) and tuple(starts) == self.offsets


def cut_rows(lengths: Sequence[int], fits: Callable[[int, int], bool]) -> list[MicroBatch] | None:
    """Micro-batches for rows of these lengths; None if a single row does not fit.

    `fits(rows, longest)` says whether that many rows of that length may run at once.
    """
    offsets = [0, *accumulate(lengths)]
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        longest = lengths[groups[-1][0]] if groups else 0
        close = lengths[row] >= longest * (1 - _MOST_FILLING)
        if groups and close and fits(len(groups[-1]) + 1, longest):
            groups[-1].append(row)
        elif fits(1, lengths[row]):
            groups.append([row])
        else:
            return None
    return [
        MicroBatch(
            tuple(sorted(group)),
            tuple(lengths[row] for row in sorted(group)),
            tuple(offsets[row] for row in sorted(group)),
        )
        for group in groups
    ]

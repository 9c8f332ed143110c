"""Rows of a session: the words in which steps are said, on the wire and in the engine alike.

A row is one sequence with a length of its own; a step adds positions to some rows, after forks and
drops. Values only: what they do to a cache is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: A step of at most this many positions is a client that waits for a token; a larger one is a prefill.
DECODE_POSITIONS: Final = 32
#: Steps of this size let the hops of a chain work on one prefill at the same time.
PREFILL_POSITIONS: Final = 128


@dataclass(frozen=True, slots=True)
class RowSlice:
    """`count` new positions of one row, from absolute position `start`."""

    row: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Fork:
    """Row `target` becomes a copy of the first `length` positions of row `source`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget a row's cache."""

    row: int


Op = Fork | Drop

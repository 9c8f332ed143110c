"""The words of a step and of a session's size, used on the wire and in the engine alike.

A row is an independent sequence with its own length. A step first applies its forks and drops and then adds
positions to some rows. These are plain values; the engine applies them to a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: A step of at most this many positions is a client that waits for a token; a larger one is a prefill.
DECODE_POSITIONS: Final = 32
#: Steps of this size let the hops of a chain work on one prefill at the same time. A hop may ask for others.
PREFILL_POSITIONS: Final = 128
#: A hop asks for no less: such steps would pass for those of a client that waits for a token.
LEAST_PREFILL_POSITIONS: Final = 2 * DECODE_POSITIONS


@dataclass(frozen=True, slots=True)
class SessionSize:
    """The cache that a session asks for: `max_rows` rows of `max_length` positions.

    A row can be cut or forked `max_rollback` positions behind its end.

    prompt_length: how long the text is that the session begins with. Rotary embeddings whose frequencies follow a
        text's length turn the positions of that text as for its whole length, and each later position as for a text
        that ends there. 0: every position as for a text that ends there.
    """

    max_length: int
    max_rows: int = 1
    max_rollback: int = 0
    prompt_length: int = 0

    @property
    def positions(self) -> int:
        """Positions of all rows together."""
        return self.max_length * self.max_rows


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
    """Forget the cache of `row`."""

    row: int


Op = Fork | Drop

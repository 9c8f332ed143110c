"""The messages by which a client finds out what went from hop to hop in a session (spec/sessions/audits.md).

Activations go from hop to hop and not through the client. A sketch tells the client a little of what a hop received, so
that the hop before it cannot say afterwards that it sent something else. A copy gives another server the same input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peerd.protocol.encoding.schema import Message, binary, choice, integer, many, mapping, required
from peerd.protocol.messages.session_fields import (
    MAX_STEP_POSITIONS,
    U32,
    NextHop,
    dump_next,
    dump_slices,
    next_hop,
    row_slices,
)
from peerd.protocol.rows import RowSlice

SEED_BYTES = 16
#: How many numbers stand for the activations of one position under one seed.
SKETCH_SIZE = 16
#: One seed for what a hop receives; and for what it computes, which only a hop that checks another one has.
MAX_SEEDS = 2
MAX_SKETCH_BYTES = MAX_STEP_POSITIONS * MAX_SEEDS * SKETCH_SIZE * 4

#: The seeds in `open`.
sketch_seeds = many(binary(SEED_BYTES, SEED_BYTES), MAX_SEEDS)


@dataclass(frozen=True, slots=True)
class Sketch(Message):
    """Hop to client: sketches of what it received, or computed, for these positions. Body: `[sum of counts, n]`.

    n is `SKETCH_SIZE` times the number of seeds for what was received, and `SKETCH_SIZE` for what was computed.
    """

    TYPE: ClassVar[str] = "sketch"
    of: Literal["input", "output"] = required(choice("input", "output"))
    rows: tuple[RowSlice, ...] = required(row_slices, dump_slices)
    tensor: dict[str, Any] = required(mapping)

    @property
    def positions(self) -> int:
        return sum(piece.count for piece in self.rows)


@dataclass(frozen=True, slots=True)
class Copy(Message):
    """Client to a hop: send the rows, as you sent them to your next hop, to this hop too. The route stays as it is."""

    TYPE: ClassVar[str] = "copy"
    epoch: int = required(integer(0, U32))
    next: NextHop = required(next_hop, dump_next)

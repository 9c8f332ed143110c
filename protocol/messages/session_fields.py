"""Fields that messages of a session have in common, and their limits (spec/sessions/session.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peerd.protocol.encoding.schema import binary, built, group, integer, many, text
from peerd.protocol.rows import RowSlice

U32 = 2**32 - 1
MAX_ROWS = 256
MAX_LENGTH = 2**24
# A longer prefill is sent as several steps, on which the hops then work at the same time.
MAX_STEP_POSITIONS = 4096

row_number = integer(0, MAX_ROWS - 1)
row_length = integer(0, MAX_LENGTH)
row_slices = many(built(group(row_number, row_length, integer(1, MAX_STEP_POSITIONS)), RowSlice), MAX_ROWS)
row_lengths = many(group(row_number, row_length), MAX_ROWS)
short_text = text(64)


def dump_slices(rows: tuple[RowSlice, ...]) -> list[list[int]]:
    """Row slices as they travel."""
    return [[piece.row, piece.start, piece.count] for piece in rows]


@dataclass(frozen=True, slots=True)
class NextHop:
    """The hop to which another hop pushes its results: the ticket to show there, and that peer's signed `peer`
    record.
    """

    ticket: bytes
    record: bytes


next_hop = built(group(binary(1, 1024), binary(1, 1024)), NextHop)


def maybe_next(value: Any) -> NextHop | None:
    """The rule for a next hop that may be absent."""
    return None if value is None else next_hop(value)


def dump_next(value: NextHop | None) -> list[bytes] | None:
    """A next hop as it travels."""
    return None if value is None else [value.ticket, value.record]

"""Which of llama.cpp's sequences each row of each session is, and what must be forgotten before the next batch.

The main thread gives sequences out and takes them back; the device thread, which alone may touch them, forgets what
they held at the beginning of the next batch. Steps fork and cut rows when a batch takes them, as in the scheduler, so a
batch carries what to do with its sequences before it runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peerd.compute.errors import ContextTooLongError, NoRoomError
from peerd.compute.steps import Piece
from peerd.protocol.rows import RowSlice


@dataclass(frozen=True, slots=True)
class Cut:
    """Forget a sequence's positions from `length` on."""

    sequence: int
    length: int = 0


class Sequences:
    """The sequences `first` to `end - 1`."""

    def __init__(self, end: int, first: int = 0) -> None:
        self._all = end - first
        self._free = list(range(end - 1, first - 1, -1))
        self._of: dict[Hashable, tuple[int, ...]] = {}
        # Of sessions that closed while a batch with them ran: the device thread may still write to them.
        self._leaving: list[int] = []
        self._cuts: list[Cut] = []

    def check_room(self, rows: int, free_tokens: int) -> None:
        """Raise NoRoomError or ContextTooLongError if there are not so many free sequences, or not so many at all."""
        if rows > self._all:
            raise ContextTooLongError(f"{rows} rows exceed the {self._all} that llama.cpp has for all sessions")
        if rows > len(self._free):
            raise NoRoomError(f"{rows} rows wanted, llama.cpp has {len(self._free)} of {self._all} free", free_tokens)

    def share_of(self, tokens: int, rows: int) -> int:
        """The part of so many KV tokens that belongs to `rows` of all sequences, rounded up."""
        return -(-rows * tokens // self._all)

    def open(self, session: Hashable, rows: int) -> None:
        """Give the session a sequence for each row. `check_room` said that there are enough."""
        self._of[session] = tuple(self._free.pop() for _ in range(rows))

    def close(self, session: Hashable, *, running: bool) -> None:
        """Take the session's sequences back: at the end of the batch that is `running`, if it is in one."""
        given = self._of.pop(session)
        if running:
            self._leaving += given
        else:
            self._take_back(given)

    def of(self, session: Hashable) -> tuple[int, ...]:
        """The session's sequences, by row."""
        return self._of[session]

    def cut(self, session: Hashable, rows: Sequence[RowSlice]) -> None:
        """Forget these positions, which a batch failed to compute, before the next one."""
        given = self._of.get(session)
        if given is not None:
            self._cuts += [Cut(given[piece.row], piece.start) for piece in rows]

    def shorten(self, session: Hashable, lengths: Mapping[int, int]) -> None:
        """Forget what these rows have beyond their lengths, before the next batch."""
        given = self._of[session]
        self._cuts += [Cut(given[row], length) for row, length in lengths.items()]

    def end_batch(self) -> None:
        """The running batch is over."""
        self._take_back(self._leaving)
        self._leaving = []

    def take_cuts(self) -> tuple[Cut, ...]:
        """What the next batch must forget first."""
        cuts, self._cuts = tuple(self._cuts), []
        return cuts

    def _take_back(self, given: Sequence[int]) -> None:
        self._cuts += map(Cut, given)
        self._free += reversed(given)


def slices_of(piece: Piece) -> Iterator[RowSlice]:
    """The new positions of each row that a piece of a step covers."""
    first = 0
    for row in piece.step.rows:
        begin = max(piece.offset - first, 0)
        end = min(piece.offset + piece.count - first, row.count)
        if begin < end:
            yield RowSlice(row.row, row.start + begin, end - begin)
        first += row.count

"""Keeps the activations that one sender sent in a session, for sending them again when a hop dies.

Each row is a list of chunks of 64 positions: thousands of one-position tensors would cost far more than their bytes. A
step may ask for hundreds of forks while all other sessions wait. So a fork shares the chunks, and when one of the rows
is written, it copies only the chunk that it writes to.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from peerd.protocol.rows import Fork, Op, RowSlice

CHUNK_POSITIONS = 64


class _Row:
    """One row's chunks. The chunks from index `own_from` on are not shared with another row."""

    __slots__ = ("chunks", "length", "own_from")

    def __init__(self, chunks: list[torch.Tensor], length: int, own_from: int) -> None:
        self.chunks = chunks
        self.length = length
        self.own_from = own_from

    def fork(self, length: int) -> _Row:
        """A new row with the first `length` positions of this one, in the same chunks."""
        shared = self.chunks[: -(-length // CHUNK_POSITIONS)]
        self.own_from = max(self.own_from, len(shared))
        return _Row(shared, length, len(shared))

    def write(self, start: int, hidden: torch.Tensor, max_length: int) -> None:
        """Cut the row at `start`, which is not beyond its end, and append `hidden`, `[positions, width]`."""
        first = start // CHUNK_POSITIONS
        del self.chunks[first + 1 :]
        if first < min(self.own_from, len(self.chunks)):
            self.chunks[first] = self.chunks[first].clone()
        self.own_from = min(self.own_from, first)
        self.length = start + len(hidden)
        while len(self.chunks) * CHUNK_POSITIONS < self.length:
            positions = min(CHUNK_POSITIONS, max(max_length, self.length) - len(self.chunks) * CHUNK_POSITIONS)
            self.chunks.append(hidden.new_empty((positions, hidden.shape[-1])))
        done = 0
        while done < len(hidden):
            index, offset = divmod(start + done, CHUNK_POSITIONS)
            count = min(len(hidden) - done, CHUNK_POSITIONS - offset)
            self.chunks[index][offset : offset + count] = hidden[done : done + count]
            done += count

    def read(self, start: int, end: int) -> torch.Tensor:
        """A copy of the positions `start` to `end - 1`."""
        first = start // CHUNK_POSITIONS
        parts = self.chunks[first : -(-end // CHUNK_POSITIONS)]
        parts[-1] = parts[-1][: end - (first + len(parts) - 1) * CHUNK_POSITIONS]
        parts[0] = parts[0][start - first * CHUNK_POSITIONS :]
        return torch.cat(parts)


class RowBuffers:
    """The activations of a session's rows, `[length, hidden]` each.

    A row never takes memory for more than `max_length` positions, which is the memory that the session committed.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._rows: dict[int, _Row] = {}

    def __repr__(self) -> str:
        return f"<RowBuffers {self.lengths}>"

    @property
    def lengths(self) -> dict[int, int]:
        """For each row, the number of positions that are kept."""
        return {number: row.length for number, row in self._rows.items()}

    def apply(self, ops: Iterable[Op]) -> None:
        """Carry out a step's forks and drops of rows."""
        for op in ops:
            if isinstance(op, Fork):
                source = self._rows.get(op.source)
                kept = min(op.length, source.length) if source is not None else 0
                self.drop(op.target)
                if source is not None and kept:
                    self._rows[op.target] = source.fork(kept)
            else:
                self.drop(op.row)

    def drop(self, row: int) -> None:
        """Forget a row."""
        self._rows.pop(row, None)

    def add(self, slices: Iterable[RowSlice], hidden: torch.Tensor) -> None:
        """Keep `hidden`, `[sum of counts, width]`. Each row is first cut where its slice starts."""
        offset = 0
        for piece in slices:
            row = self._rows.setdefault(piece.row, _Row([], 0, 0))
            row.write(piece.start, hidden[offset : offset + piece.count], self._max_length)
            offset += piece.count

    def copy(self, row: int, start: int, end: int) -> torch.Tensor:
        """A copy of the row's positions `start` to `end - 1`, `[end - start, width]`."""
        return self._rows[row].read(start, end)

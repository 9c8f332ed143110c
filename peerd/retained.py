"""What one sender sent in a session, kept so that it can be sent again when a hop dies.

Knows rows and absolute positions; knows no wire. Each row is one growing buffer, cut where the row
rolls back: thousands of one-position tensors would cost far more than their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from peerd.protocol.rows import Fork, Op, RowSlice


class Retained:
    """The activations of a session's rows, `[length, hidden]` each.

    A buffer never has more than `max_length` positions: that much memory was committed for the row.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._buffers: dict[int, torch.Tensor] = {}
        self._lengths: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<Retained {self._lengths}>"

    @property
    def lengths(self) -> dict[int, int]:
        """Positions kept of each row."""
        return dict(self._lengths)

    def apply(self, ops: Iterable[Op]) -> None:
        """Fork and drop rows as a step says."""
        for op in ops:
            if isinstance(op, Fork):
                kept = min(op.length, self._lengths.get(op.source, 0))
                self.drop(op.target)
                if kept:
                    self._buffers[op.target] = self._buffers[op.source][:kept].clone()
                    self._lengths[op.target] = kept
            else:
                self.drop(op.row)

    def drop(self, row: int) -> None:
        self._buffers.pop(row, None)
        self._lengths.pop(row, None)

    def add(self, slices: Iterable[RowSlice], hidden: torch.Tensor) -> None:
        """Keep `hidden`, `[sum of counts, width]`. Each row is cut at its slice's start first."""
        offset = 0
        for piece in slices:
            buffer = self._room(piece.row, piece.end, hidden)
            buffer[piece.start : piece.end] = hidden[offset : offset + piece.count]
            self._lengths[piece.row] = piece.end
            offset += piece.count

    def copy(self, row: int, start: int, end: int) -> torch.Tensor:
        """A copy of those of the row's positions, `[end - start, width]`."""
        return self._buffers[row][start:end].clone()

    def _room(self, row: int, end: int, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(row)
        if buffer is None or len(buffer) < end:
            room = min(2 * len(buffer) if buffer is not None else 64, self._max_length)
            grown = like.new_empty((max(end, room), like.shape[-1]))
            if buffer is not None:
                grown[: len(buffer)] = buffer
            self._buffers[row] = buffer = grown
        return buffer

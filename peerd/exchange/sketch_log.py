"""Keeps what one hop said of the positions that it received or computed: sketches of the session's first row.

A hop may say anything, so what it says is checked for its form and limited in size. Whether it is true an audit finds
out.
"""

from __future__ import annotations

import torch

from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.messages.audits import MAX_SEEDS, SKETCH_SIZE, Sketch
from peerd.protocol.rows import RowSlice

# An audit looks at a few hundred positions; of a longer row the beginning is kept, 128 KB for two seeds.
MAX_KEPT = 1024


class SketchLog:
    """The sketches that a hop was asked for with these seeds. inputs, outputs: `[positions, numbers]`, from position 0
    on without a gap; they are views that later sketches change.
    """

    def __init__(self, seeds: tuple[bytes, ...]) -> None:
        self.seeds = seeds
        self._logs = {"input": _Log(len(seeds) * SKETCH_SIZE)}
        if len(seeds) == MAX_SEEDS:
            self._logs["output"] = _Log(SKETCH_SIZE)

    def __repr__(self) -> str:
        return f"<SketchLog {', '.join(f'{len(log.kept)} of {of}' for of, log in self._logs.items())}>"

    @property
    def inputs(self) -> torch.Tensor:
        return self._logs["input"].kept

    @property
    def outputs(self) -> torch.Tensor:
        return self._logs["output"].kept

    def take(self, sketch: Sketch, body: memoryview) -> None:
        """Keep what a hop says. Raises RemoteProtocolError for what was not asked for, or has another shape."""
        log = self._logs.get(sketch.of) if self.seeds else None
        if log is None:
            raise RemoteProtocolError(f"a sketch of its {sketch.of} that was not asked for")
        header = TensorHeader.from_fields(sketch.tensor, max_elements=sketch.positions * log.width)
        if header != TensorHeader((sketch.positions, log.width), "float32", "exact"):
            raise RemoteProtocolError(f"a sketch as {header}, not {log.width} numbers for {sketch.positions} positions")
        numbers = decode_tensor(header, body)
        offset = 0
        for piece in sketch.rows:
            log.put(piece, numbers[offset : offset + piece.count])
            offset += piece.count


class _Log:
    def __init__(self, width: int) -> None:
        self.width = width
        self._numbers = torch.empty((0, width))
        self._length = 0

    @property
    def kept(self) -> torch.Tensor:
        return self._numbers[: self._length]

    def put(self, piece: RowSlice, numbers: torch.Tensor) -> None:
        # What follows a gap is left out: a replacement of a dead hop begins with one.
        if piece.row or piece.start > self._length:
            return
        end = min(piece.end, MAX_KEPT)
        if piece.start >= end:
            return
        if not len(self._numbers):
            self._numbers = torch.empty((MAX_KEPT, self.width))
        self._numbers[piece.start : end] = numbers[: end - piece.start]
        # The row was cut where the piece begins, so what was kept beyond its end is out of date.
        self._length = end

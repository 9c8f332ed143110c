"""Reads AWQ, GPTQ, compressed-tensors' integers and bitsandbytes' int8 as integers in groups, without dequantizing.

Whether a matrix can be read so is seen in its pieces' shapes, before any of them is downloaded. Its columns must belong
to groups in their order, as in all files of AWQ, in those of GPTQ that were made without `desc_act`, and in those of
compressed-tensors that store no `weight_g_idx`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from peerd.compute.checkpoint.packed.pieces import Pieces
from peerd.compute.quantized.groups import GROUPS, Codes, Grid, widened


class IntegerRows(Protocol):
    """A matrix of unsigned integers, with a scale and a zero point for each group of consecutive columns."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def integers(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows `start` to `end`: integers `[n, columns]`, and scales and zero points `[n, groups]`."""
        ...

    def in_order(self) -> bool:
        """Whether the columns belong to groups of equal size in their order."""
        ...


Shapes = Mapping[str, tuple[int, ...]]
#: Finds how many columns and groups a matrix has in its pieces' shapes; None if they do not say.
Sizes = Callable[[Shapes], tuple[int, int] | None]


def columns_first(columns_a_word: int) -> Sizes:
    """For words `[columns / columns_a_word, ...]` and scales `[groups, rows]`."""

    def sizes(shapes: Shapes) -> tuple[int, int] | None:
        words, scales = shapes["values"], shapes["scale"]
        return (words[0] * columns_a_word, scales[0]) if len(words) == len(scales) == 2 else None

    return sizes


def rows_first(columns_a_word: int) -> Sizes:
    """For words `[rows, columns / columns_a_word]` and scales `[rows, groups]`, or `[rows]` for one group."""

    def sizes(shapes: Shapes) -> tuple[int, int] | None:
        words, scales = shapes["values"], shapes["scale"]
        # Where a file says to which group each column belongs, they are in no order.
        if "groups" in shapes or len(words) != 2 or len(scales) not in (1, 2) or scales[0] != words[0]:
            return None
        return words[1] * columns_a_word, scales[1] if len(scales) == 2 else 1

    return sizes


@dataclass(frozen=True, slots=True)
class Words:
    """How a format stores integers of `bits` bits."""

    name: str
    bits: int
    sizes: Sizes
    rows: Callable[[Pieces], IntegerRows]

    def grid(self, shapes: Shapes) -> Grid | None:
        """The grid of a matrix whose pieces have these shapes, by their role; None if we have none for its groups."""
        columns, groups = self.sizes(shapes) or (0, 0)
        if not columns or not groups:
            return None
        group, rest = divmod(columns, groups)
        ours = max((size for size in GROUPS if group % size == 0), default=None)
        return None if rest or ours is None else Grid(4 if self.bits <= 4 else 8, ours, True, self.name)

    def read(self, pieces: Pieces) -> WordCodeRows:
        """The matrix as rows of codes. Raises CheckpointError if it is malformed, or its columns are in no order."""
        grid = self.grid({role: tuple(tensor.shape) for role, tensor in pieces.tensors.items()})
        matrix = self.rows(pieces)
        if grid is None or not matrix.in_order():
            raise pieces.wrong(
                "has groups of columns in no order, unlike its configuration says: read it with --quantize none"
            )
        return WordCodeRows(matrix, self.bits, grid)


@dataclass(frozen=True, slots=True)
class WordCodeRows:
    """Implements `CodeRows` for a matrix of integers of `bits` bits."""

    matrix: IntegerRows
    bits: int
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def read(self, start: int, end: int) -> Codes:
        values, scales, points = self.matrix.integers(start, end)
        # The publisher's groups may be larger than any of ours.
        times = values.shape[1] // self.grid.group // scales.shape[1]
        scales, points = (each.repeat_interleave(times, dim=1) for each in (scales, points))
        return widened(Codes(values.to(torch.uint8), scales, -points * scales), self.bits, self.grid.bits)

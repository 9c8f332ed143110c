"""Reads the rows of a parameter from the quantized tensors of a GGUF file, in the order in which the model has them.

Transformers' tensor processors reorder and join whole dequantized tensors. What they do to rows is found out by giving
them a matrix of two columns that says where each row comes from. A processor that does more than move rows, or that
wants the real width, tells us nothing; such a parameter is not read in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from peerd.compute.checkpoint.gguf.grids import GROUP, bits_of, codes_of, is_exact
from peerd.compute.checkpoint.gguf.header import GgufTensor
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.quantized.groups import Codes, Grid

Process = Callable[[list[NDArray[np.float32]]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class RowOrder:
    """For each row of the matrix the stored row, counted through all of the parameter's tensors, one after the other.

    transposed: whether the model has the transpose of that matrix.
    """

    rows: NDArray[np.int64]
    transposed: bool


def row_order(tensors: Sequence[GgufTensor], process: Process) -> RowOrder | None:
    """The order of a parameter's rows, or of each of its experts'; None if it is not rows that are moved.

    process: runs the processor on values for each tensor.
    """
    counts = [tensor.shape[-2] for tensor in tensors]
    numbers = np.arange(2 * sum(counts), dtype=np.float32).reshape(-1, 2)
    parts = np.split(numbers, np.cumsum(counts)[:-1])
    stacked = len(tensors[0].shape) == 3
    try:
        moved = process([part[None] if stacked else part for part in parts]).numpy()
    except CheckpointError:
        return None
    moved = moved[0] if stacked else moved
    for transposed in (False, True):
        matrix = moved.T if transposed else moved
        if matrix.shape == numbers.shape and (matrix[:, 1] == matrix[:, 0] + 1).all():
            first = matrix[:, 0].astype(np.int64)
            if np.array_equal(np.sort(first), numbers[:, 0].astype(np.int64)):
                return RowOrder(first // 2, transposed)
    return None


def grid_of(tensors: Sequence[GgufTensor], order: RowOrder) -> Grid | None:
    """The grid that holds all of the tensors; None if one of them is not quantized."""
    bits = [bits_of(tensor.kind) for tensor in tensors]
    known = [each for each in bits if each is not None]
    if len(known) < len(bits):
        return None
    names = sorted({tensor.kind.name for tensor in tensors})
    exact = all(is_exact(tensor.kind) for tensor in tensors)
    return Grid(max(known), GROUP, exact, " and ".join(names), order.transposed)


@dataclass(frozen=True, slots=True)
class GgufCodeRows:
    """Implements `CodeRows`: one matrix, or that of one expert, made of the rows of some stored tensors."""

    file: GgufFiles
    tensors: tuple[GgufTensor, ...]
    order: RowOrder
    bits: int
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.order.rows), self.tensors[0].shape[-1]

    def read(self, start: int, end: int) -> Codes:
        wanted = self.order.rows[start:end]
        columns = self.shape[1]
        codes = torch.empty(len(wanted), columns, dtype=torch.uint8)
        scales, zeros = torch.empty(2, len(wanted), columns // GROUP)
        first = 0
        for tensor in self.tensors:
            count = tensor.shape[-2]
            places = np.flatnonzero((first <= wanted) & (wanted < first + count))
            if len(places):
                rows = wanted[places] - first
                ascending = np.argsort(rows)
                own = self._codes(tensor, rows[ascending])
                into = torch.from_numpy(places[ascending])
                codes[into], scales[into], zeros[into] = own.codes, own.scales, own.zeros
            first += count
        return Codes(codes, scales, zeros)

    def _codes(self, tensor: GgufTensor, rows: NDArray[np.int64]) -> Codes:
        """The codes of these rows of one tensor, in ascending order."""
        offset = (self.expert or 0) * tensor.shape[-2]
        parts = [self.file.read_rows(tensor, offset + start, offset + end) for start, end in _runs(rows)]
        try:
            return codes_of(np.concatenate(parts), tensor.kind, self.bits)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.file.path}: tensor {tensor.name} is stored as {tensor.kind.name}, which we do not read"
            ) from error


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ascending row numbers as runs (start, end)."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield int(run[0]), int(run[-1]) + 1

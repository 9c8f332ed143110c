"""The stored tensors of one quantized parameter, checked on use, and their dequantization run by run.

A format turns the pieces into a `PlainRows`, which gives any rows of the matrix in fp32. The plain matrix is two to
eight times as large as its pieces, so beside it only one run of its rows is ever held in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from peerd.compute.errors import CheckpointError

# As in `gguf/weights.py`: a run stays in a core's cache, and is small beside any matrix that is quantized.
RUN_VALUES = 1 << 19

_DTYPES_OF: Mapping[str, tuple[torch.dtype, ...]] = {
    "numbers": (torch.float32, torch.float16, torch.bfloat16),
    "fp8": (torch.float8_e4m3fn, torch.float8_e5m2),
    "int8": (torch.int8,),
    "bytes": (torch.uint8,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
}


@dataclass(frozen=True, slots=True)
class Pieces:
    """One parameter's tensors by their role. `where` and `name` are for error messages."""

    tensors: Mapping[str, torch.Tensor]
    name: str
    where: object

    def __contains__(self, role: str) -> bool:
        return role in self.tensors

    def take(self, role: str, *kinds: str, ndim: int | None = None) -> torch.Tensor:
        """The tensor with this role. Raises CheckpointError if it is missing, or has none of these kinds or another
        `ndim`.
        """
        tensor = self.tensors.get(role)
        if tensor is None:
            raise self.wrong(f"has no {role}")
        if not any(tensor.dtype in _DTYPES_OF[kind] for kind in kinds):
            raise self.wrong(f"has a {role} of {str(tensor.dtype).removeprefix('torch.')}, not of {' or '.join(kinds)}")
        if ndim is not None and tensor.ndim != ndim:
            raise self.wrong(f"has a {role} of shape {list(tensor.shape)}, not of {ndim} dimensions")
        return tensor

    def scale(self, role: str = "scale") -> torch.Tensor:
        """A tensor of scales as fp32. It may be stored as numbers, or as exponents of two only."""
        tensor = self.tensors.get(role)
        if tensor is not None and tensor.dtype == getattr(torch, "float8_e8m0fnu", None):
            return tensor.float()
        return self.take(role, "numbers", "fp8").float()

    def check_shape(self, role: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
        """Raise CheckpointError if a piece does not have the shape that the other pieces require."""
        if tuple(tensor.shape) != tuple(expected):
            raise self.wrong(f"has a {role} of shape {list(tensor.shape)}, not {list(expected)}")

    def of_expert(self, index: int) -> Pieces:
        """One expert's pieces, if the first dimension of every piece is the experts."""
        parts = {role: tensor[index] for role, tensor in self.tensors.items()}
        return Pieces(parts, f"{self.name}[{index}]", self.where)

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: quantized tensor {self.name} {what}")


class PlainRows(Protocol):
    """A quantized matrix that can be dequantized in parts, to fp32 rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns of the dequantized matrix."""
        ...

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Rows `start` to `end` in fp32: `[end - start, columns]`."""
        ...


def plain(matrix: PlainRows, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize the whole matrix to `dtype`, run by run."""
    rows, columns = matrix.shape
    whole = torch.empty(rows, columns, dtype=dtype)
    step = max(1, RUN_VALUES // max(1, columns))
    for start in range(0, rows, step):
        end = min(rows, start + step)
        whole[start:end] = matrix.rows(start, end)
    return whole


def nibbles(packed: torch.Tensor, start: int, end: int, *, high_first: bool) -> torch.Tensor:
    """The half bytes `start` to `end` of a flat uint8 tensor, as int32."""
    own = packed[start // 2 : -(-end // 2)].int()
    low, high = own & 15, own >> 4
    both = torch.stack((high, low) if high_first else (low, high), dim=-1).reshape(-1)
    return both[start % 2 :][: end - start]


def value_count(shape: Sequence[int]) -> int:
    """How many values a tensor of this shape has."""
    return math.prod(shape)

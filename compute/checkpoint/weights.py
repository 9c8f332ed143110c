"""The interface between a checkpoint and the files that hold its tensors, the same for every format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from peerd.compute.quantized.groups import CodeRows, Grid

# Publishers' names for weights files: one file, or an index that lists shards.
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """One tensor exactly as a file stores it, for digests: its stored name, dtype, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


ReadRows = Callable[[Sequence[int]], "torch.Tensor"]
"""Reads rows of a matrix by their numbers, `[rows, columns]`. Raises CheckpointError."""


class Weights(Protocol):
    """A decoder's parameters by the decoder's own names (`layers.7.mlp.down_proj.weight`), and `lm_head.weight`.

    Every method that takes a parameter raises CheckpointError if it is missing or its file is incomplete.
    """

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters."""
        ...

    def digests(self) -> Mapping[str, bytes]:
        """The sha256 (32 bytes) of every weights file of the checkpoint, by file name."""
        ...

    def fetch(self, parameters: Iterable[str]) -> None:
        """Download the files that hold these parameters, and keep them until `close`. Reading does so too, one file at
        a time.
        """
        ...

    def download_bytes(self, parameters: Iterable[str]) -> int:
        """The disk space of these parameters' files once they are downloaded, in bytes; 0 for local files."""
        ...

    def on_disk(self, parameter: str) -> bool:
        """Whether the parameter can be read without a download."""
        ...

    @property
    def bytes_read(self) -> int:
        """How many bytes of the weights files were read so far, headers included."""
        ...

    @property
    def packing(self) -> str:
        """The publisher's way of quantizing the weights; empty if they are not quantized."""
        ...

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        """The dtype in which a parameter is stored, without reading it; None if it is quantized or torch has no such
        dtype.
        """
        ...

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one parameter into memory of its own, in its stored dtype; if it is quantized, in `dtype` (fp32 if
        None).

        The parameters of a GGUF file come in fp32.
        """
        ...

    def read_slices(self, parameter: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """Read a parameter of three dimensions, one matrix of its first dimension after the other. For dtypes see
        `read`.
        """
        ...

    def rows(self, parameter: str) -> ReadRows | None:
        """What reads rows of a matrix without the others, in the dtypes of `read`; None if it is not stored so that
        they can be.
        """
        ...

    def grid(self, parameter: str) -> Grid | None:
        """The grid of integers on which a parameter is stored, or which is near to how it is stored; None if it is
        stored as plain numbers, or in a way that we only dequantize.
        """
        ...

    def read_codes(self, parameter: str) -> Iterator[CodeRows]:
        """The matrix of a parameter that has a grid, or each expert's, undequantized."""
        ...

    def stored(self, parameter: str) -> Iterator[StoredBytes]:
        """The stored tensors that make one parameter."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...

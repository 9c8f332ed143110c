"""What a checkpoint needs of the files that hold its tensors, whatever their format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# What publishers call their weights: one file, or shards that an index lists.
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """One tensor as a file holds it, for digests: its stored name, dtype and shape, and its bytes untouched."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Weights(Protocol):
    """A decoder's parameters by the decoder's own names (`layers.7.mlp.down_proj.weight`), and `lm_head.weight`.

    Every method that takes a parameter raises CheckpointError if it is missing or its file is not whole.
    """

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters there are."""
        ...

    def digests(self) -> Mapping[str, bytes]:
        """The sha256, 32 bytes, of every weights file of the checkpoint, by its name."""
        ...

    def fetch(self, parameters: Iterable[str]) -> None:
        """Have the files that hold these on this machine, until they are closed; reading does the same, one by one."""
        ...

    def download_bytes(self, parameters: Iterable[str]) -> int:
        """What the files that hold these take of the disk once they are downloaded; 0 where they never are."""
        ...

    def on_disk(self, parameter: str) -> bool:
        """Whether it can be read without fetching anything."""
        ...

    @property
    def bytes_read(self) -> int:
        """How many bytes of the weights files were read so far, headers included."""
        ...

    @property
    def packing(self) -> str:
        """How the publisher quantized the weights; empty where they are plain."""
        ...

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        """What a parameter is stored in, without reading it; None where it is quantized, or torch has no such dtype."""
        ...

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One parameter in its stored dtype, or in `dtype` (fp32 if None) if it is dequantized; in memory of its own.

        A GGUF file's come in fp32.
        """
        ...

    def read_slices(self, parameter: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """A parameter of three dimensions, one matrix of its first dimension after the other, as `read` gives it."""
        ...

    def stored(self, parameter: str) -> Iterator[StoredBytes]:
        """The stored tensors that make one parameter."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...

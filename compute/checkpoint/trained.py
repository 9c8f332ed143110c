"""A model of which some blocks were trained further: a base checkpoint, and other weights for those blocks.

It is a folder with a description, which names the base and the digest of every trained block, and where the blocks were
trained, a file with their weights. A client, and a server of other blocks, need only the description. The digests make
it another model, whose servers are never mixed with the base's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint, read_json
from peerd.compute.checkpoint.digests import tensors_digest
from peerd.compute.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from peerd.compute.checkpoint.weights import ReadRows, StoredBytes, Weights
from peerd.compute.errors import CheckpointError
from peerd.compute.quantized.groups import CodeRows, Grid

DESCRIPTION, BLOCKS = "peerd-trained.json", "blocks.safetensors"


@dataclass(frozen=True, slots=True)
class Description:
    """What a trained model is made of. `base`: a path or `org/name@commit`; `blocks`: digests of the trained blocks."""

    base: str
    base_digest: bytes
    blocks: Mapping[int, bytes]

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read the file. Raises CheckpointError."""
        fields = read_json(path)
        try:
            blocks = {int(block): bytes.fromhex(digest) for block, digest in fields["blocks"].items()}
            found = cls(str(fields["base"]), bytes.fromhex(fields["base_digest"]), blocks)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: is not the description of a trained model: {error!r}") from None
        if not blocks or any(len(digest) != 32 for digest in (found.base_digest, *blocks.values())):
            raise CheckpointError(f"{path}: is not the description of a trained model: digests have 32 bytes")
        return found

    def write(self, folder: Path) -> None:
        """Write it into a folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        blocks = {str(block): digest.hex() for block, digest in sorted(self.blocks.items())}
        fields = {"base": self.base, "base_digest": self.base_digest.hex(), "blocks": blocks}
        (folder / DESCRIPTION).write_text(json.dumps(fields, indent=1) + "\n")

    @property
    def model_digest(self) -> bytes:
        """The trained model's digest, 32 bytes (spec/training/span-training.md)."""
        digest = hashlib.sha256(b"peerd trained 1\n" + self.base_digest)
        for block, own in sorted(self.blocks.items()):
            digest.update(block.to_bytes(4, "big") + own)
        return digest.digest()


class TrainedCheckpoint(Checkpoint):
    """A base checkpoint with trained blocks in the place of its own."""

    def __init__(self, base: Checkpoint, description: Description, folder: Path) -> None:
        self._trained = _TrainedWeights(base, description, folder)
        super().__init__(
            base.path,
            base.family,
            base.config,
            self._trained,
            name=folder.resolve().name,
            published_config={},
            disk_bytes=base.disk_bytes,
            gguf_metadata=base.gguf_metadata,
        )
        self._description = description
        self._base = base

    @cached_property
    def model_digest(self) -> bytes:
        return self._description.model_digest

    def block_digest(self, block: int) -> bytes:
        """As for every checkpoint. Raises CheckpointError if the weights here are not those of the description."""
        expected = self._description.blocks.get(block)
        if expected is None:
            return self._base.block_digest(block)
        if self._trained.digest(block) != expected:
            raise CheckpointError(f"{self.name}: the weights of block {block} are not those that {DESCRIPTION} names")
        return expected


def base_of(checkpoint: Checkpoint) -> str:
    """How a description names the checkpoint as its base."""
    if checkpoint.hub_id:
        return f"{checkpoint.hub_id}@{checkpoint.commit}"
    return str(checkpoint.path.resolve())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file that is on the disk when this returns. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # This is how the library says what the system said.
        raise OSError(str(error)) from None
    with path.open("rb") as file:
        os.fsync(file.fileno())


def block_digests(path: Path, layers: str) -> dict[int, bytes]:
    """The digests of the blocks whose tensors a file of trained blocks holds. Raises CheckpointError."""
    with SafetensorsFile(path) as file:
        blocks = {int(name.split(".")[1]) for name in file.tensors}
        return {block: _block_digest(file, f"{layers}.{block}.") for block in sorted(blocks)}


def _block_digest(file: SafetensorsFile, prefix: str) -> bytes:
    return tensors_digest(_stored(file, sorted(name for name in file.tensors if name.startswith(prefix))))


def _stored(file: SafetensorsFile, names: Iterable[str]) -> Iterator[StoredBytes]:
    for name in names:
        tensor = file.stored(name)
        yield StoredBytes(name, tensor.dtype, tensor.shape, file.read_bytes(tensor).numpy().data)


class _TrainedWeights:
    """Implements `Weights`: the trained blocks' from the folder's file, all others from the base."""

    def __init__(self, base: Checkpoint, description: Description, folder: Path) -> None:
        self._base: Weights = base.weights
        self._close_base = base.close
        self._layers = base.family.layers
        self._trained = frozenset(description.blocks)
        path = folder / BLOCKS
        self._file = SafetensorsFile(path) if path.exists() else None

    @property
    def parameters(self) -> tuple[str, ...]:
        return self._base.parameters

    def digests(self) -> Mapping[str, bytes]:
        return self._base.digests()

    def fetch(self, parameters: Iterable[str]) -> None:
        self._base.fetch([name for name in parameters if not self._is_trained(name)])

    def download_bytes(self, parameters: Iterable[str]) -> int:
        return self._base.download_bytes([name for name in parameters if not self._is_trained(name)])

    def on_disk(self, parameter: str) -> bool:
        if self._is_trained(parameter):
            return self._file is not None and parameter in self._file.tensors
        return self._base.on_disk(parameter)

    @property
    def bytes_read(self) -> int:
        return self._base.bytes_read + (self._file.bytes_read if self._file else 0)

    @property
    def packing(self) -> str:
        return self._base.packing

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        if self._is_trained(parameter):
            return DTYPES.get(self._own(parameter).stored(parameter).dtype)
        return self._base.stored_dtype(parameter)

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self._is_trained(parameter):
            return self._own(parameter).read(parameter)
        return self._base.read(parameter, dtype)

    def read_slices(self, parameter: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        if self._is_trained(parameter):
            return self._own(parameter).read_slices(parameter)
        return self._base.read_slices(parameter, dtype)

    def rows(self, parameter: str) -> ReadRows | None:
        return None if self._is_trained(parameter) else self._base.rows(parameter)

    def grid(self, parameter: str) -> Grid | None:
        return None if self._is_trained(parameter) else self._base.grid(parameter)

    def read_codes(self, parameter: str) -> Iterator[CodeRows]:
        return self._base.read_codes(parameter)

    def stored(self, parameter: str) -> Iterator[StoredBytes]:
        if self._is_trained(parameter):
            return _stored(self._own(parameter), [parameter])
        return self._base.stored(parameter)

    def digest(self, block: int) -> bytes:
        """The digest of a trained block's weights as the file stores them. Raises CheckpointError."""
        prefix = f"{self._layers}.{block}."
        return _block_digest(self._own(prefix), prefix)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._close_base()

    def _is_trained(self, parameter: str) -> bool:
        layers, _, rest = parameter.partition(".")
        with suppress(ValueError):
            return layers == self._layers and int(rest.partition(".")[0]) in self._trained
        return False

    def _own(self, parameter: str) -> SafetensorsFile:
        if self._file is None:
            block = parameter.split(".")[1]
            raise CheckpointError(f"block {block} was trained, and its weights are only on the server that trained it")
        return self._file

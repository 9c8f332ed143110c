"""Reads the parameters of a decoder from a folder of safetensors shards.

A shard is opened only when one of its tensors is read, so a span needs only the shards that hold it. The folder may be
on this machine or on the hub; `Folder` hides which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from peerd.compute.checkpoint.folder import Folder
from peerd.compute.checkpoint.packed.packing import Packing, refuse_stray_pieces
from peerd.compute.checkpoint.packed.pieces import Pieces
from peerd.compute.checkpoint.parameter_names import Recipe, recipes
from peerd.compute.checkpoint.safetensors_file import DTYPES, SafetensorsFile, StoredTensor
from peerd.compute.checkpoint.weights import INDEX_NAME, SINGLE_NAME, ReadRows, StoredBytes
from peerd.compute.errors import CheckpointError
from peerd.compute.families.family import Family
from peerd.compute.quantized.groups import CodeRows, Grid


class SafetensorsWeights:
    """Implements `Weights`. Raises CheckpointError if the folder has no safetensors or its index is malformed.

    `close` closes the folder too.
    """

    def __init__(self, folder: Folder, family: Family, packing: Packing | None = None) -> None:
        self.directory = folder.where
        self._folder = folder
        self._packing = packing
        self._open: dict[str, SafetensorsFile] = {}
        self._headers: dict[str, Mapping[str, StoredTensor]] = {}
        try:
            self._shard_of = self._index()
            # If the weights are quantized, a tensor that recipes name may be stored in several pieces.
            self._pieces = packing.sort(self._shard_of) if packing else {}
            self._recipes = recipes(self._whole_names(family), family, self.directory)
        except BaseException:
            self.close()
            raise

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self._recipes)

    @property
    def packing(self) -> str:
        return self._packing.name if self._packing else ""

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        name = self._recipe(parameter).names[0]
        return None if name in self._pieces else DTYPES.get(self._header_of(self._shard_of[name])[name].dtype)

    def digests(self) -> Mapping[str, bytes]:
        return {shard: self._folder.sha256(shard) for shard in set(self._shard_of.values())}

    def fetch(self, parameters: Iterable[str]) -> None:
        self._folder.fetch(self._shards(parameters))

    def download_bytes(self, parameters: Iterable[str]) -> int:
        return sum(map(self._folder.download_bytes, self._shards(parameters)))

    def _shards(self, parameters: Iterable[str]) -> set[str]:
        return {self._shard_of[name] for parameter in parameters for name in self._stored_names(parameter)}

    def on_disk(self, parameter: str) -> bool:
        return all(self._folder.on_disk(self._shard_of[name]) for name in self._stored_names(parameter))

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._open.values())

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        recipe = self._recipe(parameter)
        return self._read_experts(parameter, recipe, dtype) if recipe.parts else self._read_rows(recipe, dtype)

    def read_slices(self, parameter: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        recipe = self._recipe(parameter)
        if not recipe.parts:
            in_one = len(recipe.names) == 1
            yield from self._slices_of_one(recipe.names[0], dtype) if in_one else self._read_rows(recipe, dtype)
            return
        for first in range(0, len(recipe.names), recipe.parts):
            pieces = [self._read_one(name, dtype) for name in recipe.names[first : first + recipe.parts]]
            if any(piece.ndim != 2 or piece.shape[1:] != pieces[0].shape[1:] for piece in pieces):
                raise CheckpointError(f"{self.directory}: tensor {recipe.names[first]} does not fit its neighbours")
            yield torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def rows(self, parameter: str) -> ReadRows | None:
        recipe = self._recipe(parameter)
        name = recipe.names[0]
        if recipe.parts or name in self._pieces or len(self._header_of(self._shard_of[name])[name].shape) != 2:
            return None
        return partial(self._file_of(name).read_rows, name)

    def grid(self, parameter: str) -> Grid | None:
        recipe, words = self._recipes.get(parameter), self._packing.words if self._packing else None
        # What is stored in pieces is put together from plain numbers.
        if words is None or recipe is None or len(recipe.names) > 1:
            return None
        pieces = self._pieces.get(recipe.names[0])
        if pieces is None:
            return None
        return words.grid({role: self._header_of(self._shard_of[name])[name].shape for role, name in pieces.items()})

    def read_codes(self, parameter: str) -> Iterator[CodeRows]:
        words, pieces = (
            self._packing.words if self._packing else None,
            self._read_pieces(self._recipe(parameter).names[0]),
        )
        if words is None or pieces is None:
            raise ValueError(f"{parameter} has no grid")
        yield words.read(pieces)

    def stored(self, parameter: str) -> Iterator[StoredBytes]:
        for name in self._stored_names(parameter):
            file = self._file_of(name)
            tensor = file.stored(name)
            yield StoredBytes(name, tensor.dtype, tensor.shape, file.read_bytes(tensor).numpy().data)

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._folder.close()

    def _index(self) -> Mapping[str, str]:
        """Stored name -> the shard's file name."""
        if INDEX_NAME in self._folder:
            return _read_index(self._folder.path(INDEX_NAME))
        if SINGLE_NAME not in self._folder:
            raise CheckpointError(
                f"{self.directory}: holds neither {SINGLE_NAME} nor {INDEX_NAME} (pickled weights are never read)"
            )
        if self._folder.on_disk(SINGLE_NAME):
            return dict.fromkeys(self._file(SINGLE_NAME).tensors, SINGLE_NAME)
        return dict.fromkeys(self._folder.tensors(SINGLE_NAME), SINGLE_NAME)

    def _recipe(self, parameter: str) -> Recipe:
        try:
            return self._recipes[parameter]
        except KeyError:
            raise CheckpointError(f"{self.directory}: tensor {parameter} is missing") from None

    def _whole_names(self, family: Family) -> list[str]:
        """The stored tensors' names; the pieces of one quantized tensor count as one, under the tensor's name."""
        used = {piece for pieces in self._pieces.values() for piece in pieces.values()}
        plain = [name for name in self._shard_of if name not in used]
        if self._packing:
            plain = [name for name in plain if not self._packing.is_unused(name)]
        refuse_stray_pieces(plain, family.layers, self.directory)
        return [*plain, *self._pieces]

    def _stored_names(self, parameter: str) -> list[str]:
        """The stored tensors that make a parameter, in an order that does not depend on the file's."""
        names = self._recipe(parameter).names
        return [piece for name in names for piece in sorted(self._pieces.get(name, {"": name}).values())]

    def _header_of(self, shard: str) -> Mapping[str, StoredTensor]:
        if self._folder.on_disk(shard):
            return self._file(shard).tensors
        if shard not in self._headers:
            self._headers[shard] = self._folder.tensors(shard)
        return self._headers[shard]

    def _file_of(self, stored_name: str) -> SafetensorsFile:
        return self._file(self._shard_of[stored_name])

    def _file(self, shard: str) -> SafetensorsFile:
        if shard not in self._open:
            self._open[shard] = SafetensorsFile(self._folder.path(shard))
        return self._open[shard]

    def _read_one(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        if (pieces := self._read_pieces(name)) is None:
            return self._file_of(name).read(name)
        assert self._packing is not None
        return self._packing.unpack(pieces, dtype or torch.float32)

    def _read_rows(self, recipe: Recipe, dtype: torch.dtype | None) -> torch.Tensor:
        """Read a parameter without an axis of experts."""
        if len(recipe.names) == 1:
            return self._read_one(recipe.names[0], dtype)
        pieces = [self._read_one(name, dtype) for name in recipe.names]
        kinds = {(piece.ndim > 0, piece.shape[1:], piece.dtype) for piece in pieces}
        if len(kinds) > 1 or not pieces[0].ndim:
            raise CheckpointError(f"{self.directory}: tensor {recipe.names[0]} does not fit its neighbours")
        return torch.cat(pieces)

    def _slices_of_one(self, name: str, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
        if (pieces := self._read_pieces(name)) is None:
            return self._file_of(name).read_slices(name)
        assert self._packing is not None
        return self._packing.unpack_slices(pieces, dtype or torch.float32)

    def _read_pieces(self, name: str) -> Pieces | None:
        """The pieces of a quantized tensor; None for a tensor that is not quantized."""
        pieces = self._pieces.get(name)
        if pieces is None:
            return None
        tensors = {role: self._file_of(stored).read(stored) for role, stored in pieces.items()}
        return Pieces(tensors, name, self.directory)

    def _read_experts(self, parameter: str, recipe: Recipe, dtype: torch.dtype | None) -> torch.Tensor:
        """Read expert by expert into one tensor, so that memory never holds a second copy of all experts."""
        first = [self._read_one(name, dtype) for name in recipe.names[: recipe.parts]]
        if any(piece.ndim != 2 for piece in first):
            raise CheckpointError(f"{self.directory}: tensor {parameter} has experts that are no matrices")
        rows, columns = [piece.shape[0] for piece in first], first[0].shape[1]
        whole = torch.empty(len(recipe.names) // recipe.parts, sum(rows), columns, dtype=first[0].dtype)
        for index, name in enumerate(recipe.names):
            expert, part = divmod(index, recipe.parts)
            piece = self._read_one(name, dtype) if expert else first[part]
            if piece.shape != (rows[part], columns) or piece.dtype != whole.dtype:
                raise CheckpointError(f"{self.directory}: tensor {name} differs from the other experts'")
            whole[expert, sum(rows[:part]) : sum(rows[: part + 1])] = piece
        return whole


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        items = dict(weight_map.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not an index of shards") from error
    for name, shard in items.items():
        # Shards lie beside their index: an index must not name other files of this machine.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {name} is said to lie in {shard!r}, which is no shard's name")
    return items

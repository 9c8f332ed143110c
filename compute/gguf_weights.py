"""A GGUF file, read as the parameters of a decoder.

GGUF stores some tensors otherwise than Transformers: llama's q and k are permuted, gemma's norms shifted,
bloom's q, k and v apart. Transformers' own tensor processors undo that; here they are given one parameter
at a time. Tensors are dequantized to fp32 in runs of rows, so that nothing is held twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray

from peerd.compute.digests import file_digest
from peerd.compute.errors import CheckpointError, UnsupportedModel
from peerd.compute.gguf_file import GgufTensor
from peerd.compute.gguf_split import GgufFiles
from peerd.compute.weights import StoredBytes

# The codec makes several fp32 copies of what it is given: runs of this many values stay in a core's cache, which is
# ten times as fast as whole embeddings, and small beside them.
RUN_VALUES = 1 << 19


class GgufWeights:
    """Implements `Weights`. `sources` gives, for each parameter, the stored tensors it is made of.

    `processor` is Transformers' tensor processor for the file's architecture, and `names` its map from stored names to
    parameters.
    """

    def __init__(
        self, file: GgufFiles, sources: Mapping[str, tuple[str, ...]], names: Mapping[str, str], processor: Any
    ) -> None:
        self._file = file
        self._sources = sources
        self._names = names
        self._processor = processor

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def digests(self) -> Mapping[str, bytes]:
        return {path.name: file_digest(path) for path in self._file.paths}

    def fetch(self, parameters: Iterable[str]) -> None:
        pass

    def on_disk(self, parameter: str) -> bool:
        return True

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def read(self, parameter: str) -> torch.Tensor:
        # Experts' gate and up are two stored tensors of one parameter: the processor gathers them in here.
        gathered: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for tensor in self._tensors(parameter):
            processed = self._processor.process(
                weights=self._dequantized(tensor),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters=gathered,
            )
            if processed.name is not None:
                return torch.from_numpy(np.ascontiguousarray(processed.weights))
        return gathered["tensors"][parameter]

    def read_slices(self, parameter: str) -> Iterator[torch.Tensor]:
        # Transformers' processors take whole tensors only, so one is in memory at a time.
        yield from self.read(parameter)

    def stored(self, parameter: str) -> Iterator[StoredBytes]:
        for tensor in self._tensors(parameter):
            data = self._file.read_rows(tensor, 0, math.prod(tensor.shape[:-1]))
            yield StoredBytes(tensor.name, tensor.kind.name, tensor.shape, data.reshape(-1).data)

    def close(self) -> None:
        self._file.close()

    def _tensors(self, parameter: str) -> list[GgufTensor]:
        names = self._sources.get(parameter, (parameter,))
        if missing := [name for name in names if name not in self._file.tensors]:
            raise CheckpointError(f"{self._file.path}: tensor {missing[0]} is missing")
        return [self._file.tensors[name] for name in names]

    def _dequantized(self, tensor: GgufTensor) -> NDArray[np.float32]:
        """The tensor's values, fp32, in its shape."""
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        out = np.empty((rows, columns), dtype=np.float32)
        run = max(1, RUN_VALUES // columns)
        for start in range(0, rows, run):
            end = min(rows, start + run)
            try:
                out[start:end] = dequantize(self._file.read_rows(tensor, start, end), tensor.kind)
            except NotImplementedError as error:
                raise UnsupportedModel(
                    f"{self._file.path}: tensor {tensor.name} is stored as {tensor.kind.name}, which we do not read"
                ) from error
        return out.reshape(tensor.shape)

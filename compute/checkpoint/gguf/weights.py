"""Reads the parameters of a decoder from a GGUF file.

GGUF stores some tensors in another form than Transformers: llama's q and k are permuted, gemma's norms shifted, bloom's
q, k and v separate. Transformers' own tensor processors undo that; here each is called for one parameter at a time.
Tensors are dequantized to fp32 in runs of rows, so that memory never holds two copies of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray

from peerd.compute.checkpoint.gguf.code_rows import GgufCodeRows, RowOrder, grid_of, row_order
from peerd.compute.checkpoint.gguf.grids import GROUP
from peerd.compute.checkpoint.gguf.header import GgufTensor
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.checkpoint.weights import ReadRows, StoredBytes
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.quantized.groups import CodeRows, Grid

# The codec makes several fp32 copies of its input. Runs of this many values stay in a core's cache, which is ten times
# as fast as whole embeddings, and are small beside them.
RUN_VALUES = 1 << 19


class GgufWeights:
    """Implements `Weights`. `sources` gives, for each parameter, the stored tensors from which it is made.

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
    def file(self) -> GgufFiles:
        """The file, for code that reads its tensors as they are stored."""
        return self._file

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def digests(self) -> Mapping[str, bytes]:
        return self._file.digests()

    def fetch(self, parameters: Iterable[str]) -> None:
        self._file.fetch(self._stored_names(parameters))

    def download_bytes(self, parameters: Iterable[str]) -> int:
        return self._file.download_bytes(self._stored_names(parameters))

    def on_disk(self, parameter: str) -> bool:
        return self._file.on_disk(self._stored_names([parameter]))

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    @property
    def packing(self) -> str:
        return ""

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        return None

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensors = self._tensors(parameter)
        if not self._are_experts(tensors):
            return self._processed(parameter, tensors)
        whole: torch.Tensor | None = None
        # Expert by expert, because a processor makes copies of its input.
        for expert, matrix in enumerate(self.read_slices(parameter)):
            whole = torch.empty(tensors[0].shape[0], *matrix.shape) if whole is None else whole
            whole[expert] = matrix
        assert whole is not None
        return whole

    def read_slices(self, parameter: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        tensors = self._tensors(parameter)
        if not self._are_experts(tensors):
            yield from self._processed(parameter, tensors)
            return
        for expert in range(tensors[0].shape[0]):
            yield self._processed(parameter, tensors, expert)[0]

    def rows(self, parameter: str) -> ReadRows | None:
        tensors = self._tensors(parameter)
        order = self._row_order(parameter, tensors)
        if len(tensors) > 1 or len(tensors[0].shape) != 2 or order is None or order.transposed:
            return None
        return partial(self._read_rows, tensors[0], order.rows)

    def _read_rows(self, tensor: GgufTensor, order: NDArray[np.int64], rows: Sequence[int]) -> torch.Tensor:
        if rows and not 0 <= min(rows) <= max(rows) < len(order):
            raise CheckpointError(f"{self._file.path}: tensor {tensor.name} has {len(order)} rows, not {max(rows) + 1}")
        stored = [self._file.read_rows(tensor, int(order[row]), int(order[row]) + 1) for row in rows]
        values = self._values(np.concatenate(stored), tensor) if stored else np.empty((0, tensor.shape[-1]))
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def grid(self, parameter: str) -> Grid | None:
        if parameter not in self._sources:
            return None
        tensors = self._tensors(parameter)
        order = self._row_order(parameter, tensors)
        return None if order is None else grid_of(tensors, order)

    def read_codes(self, parameter: str) -> Iterator[CodeRows]:
        tensors = self._tensors(parameter)
        order = self._row_order(parameter, tensors)
        grid = None if order is None else grid_of(tensors, order)
        if order is None or grid is None:
            raise ValueError(f"{parameter} has no grid")
        experts = range(tensors[0].shape[0]) if self._are_experts(tensors) else (None,)
        for expert in experts:
            yield GgufCodeRows(self._file, tuple(tensors), order, grid.bits, expert)

    def stored(self, parameter: str) -> Iterator[StoredBytes]:
        for tensor in self._tensors(parameter):
            data = self._file.read_rows(tensor, 0, math.prod(tensor.shape[:-1]))
            yield StoredBytes(tensor.name, tensor.kind.name, tensor.shape, data.reshape(-1).data)

    def close(self) -> None:
        self._file.close()

    def _stored_names(self, parameters: Iterable[str]) -> list[str]:
        return [name for parameter in parameters for name in self._sources.get(parameter, ())]

    def _tensors(self, parameter: str) -> list[GgufTensor]:
        names = self._sources.get(parameter, (parameter,))
        if missing := [name for name in names if name not in self._file.tensors]:
            raise CheckpointError(f"{self._file.path}: tensor {missing[0]} is missing")
        return [self._file.tensors[name] for name in names]

    def _row_order(self, parameter: str, tensors: list[GgufTensor]) -> RowOrder | None:
        """How the processor orders a parameter's rows; None if they cannot be read undequantized."""
        shapes = {len(tensor.shape) for tensor in tensors}
        widths = {tensor.shape[-1] for tensor in tensors}
        if len(shapes) > 1 or (2 if not self._are_experts(tensors) else 3) not in shapes:
            return None
        if len(widths) > 1 or widths.pop() % GROUP:
            return None
        return row_order(
            tensors, lambda values: self._process(parameter, tensors, lambda tensor: values[tensors.index(tensor)])
        )

    def _processed(self, parameter: str, tensors: list[GgufTensor], expert: int | None = None) -> torch.Tensor:
        """The processor's result for a parameter's tensors, or for one expert's part of each: [1, rows, columns]."""
        return self._process(parameter, tensors, lambda tensor: self._dequantized(tensor, expert))

    def _process(
        self, parameter: str, tensors: list[GgufTensor], values_of: Callable[[GgufTensor], NDArray[np.float32]]
    ) -> torch.Tensor:
        """The processor's result for these values of a parameter's tensors."""
        # The experts' gate and up are two stored tensors of one parameter: the processor collects both in here.
        gathered: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for tensor in tensors:
            values = values_of(tensor)
            try:
                processed = self._processor.process(
                    weights=values, name=tensor.name, tensor_key_mapping=self._names, parsed_parameters=gathered
                )
            except (ValueError, LookupError, RuntimeError, ArithmeticError) as error:
                # The processor reorders by the sizes in the metadata, which a tensor's shape may contradict.
                shape = list(tensor.shape)
                raise CheckpointError(
                    f"{self._file.path}: tensor {tensor.name} has shape {shape}, which its metadata do not allow"
                ) from error
            if processed.name is not None:
                return torch.from_numpy(np.ascontiguousarray(processed.weights))
        return gathered["tensors"][parameter]

    def _dequantized(self, tensor: GgufTensor, expert: int | None) -> NDArray[np.float32]:
        """The tensor's values in fp32 and in its shape, or those of one expert as [1, rows, columns]."""
        shape = tensor.shape if expert is None else (1, *tensor.shape[1:])
        rows, columns = math.prod(shape[:-1]), shape[-1]
        out = np.empty((rows, columns), dtype=np.float32)
        run = max(1, RUN_VALUES // columns)
        first = rows * (expert or 0)
        for start in range(0, rows, run):
            end = min(rows, start + run)
            out[start:end] = self._values(self._file.read_rows(tensor, first + start, first + end), tensor)
        return out.reshape(shape)

    def _values(self, stored: NDArray[np.uint8], tensor: GgufTensor) -> NDArray[np.float32]:
        """Rows of a tensor in fp32."""
        try:
            values: NDArray[np.float32] = dequantize(stored, tensor.kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self._file.path}: tensor {tensor.name} is stored as {tensor.kind.name}, which we do not read"
            ) from error
        return values

    def _are_experts(self, tensors: list[GgufTensor]) -> bool:
        """Whether each tensor holds one matrix for each expert. Raises CheckpointError if their shapes differ."""
        if any(len(tensor.shape) != 3 or "_exps." not in tensor.name for tensor in tensors):
            return False
        for other in tensors[1:]:
            if other.shape != tensors[0].shape:
                raise CheckpointError(f"{self._file.path}: tensors {tensors[0].name} and {other.name} differ in shape")
        return True

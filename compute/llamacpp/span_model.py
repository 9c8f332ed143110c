"""A span's blocks in llama.cpp: hidden states in, hidden states out, and the KV cache of its sequences.

llama.cpp takes hidden states in place of tokens. It returns logits, not a block's output, so a callback that it calls
for each node of its graph copies the output out, and ends the graph there. If only later blocks of the span are wanted,
the graph still begins with the first: the callback then overwrites the output of the block before with the input.
Those first blocks are computed in vain, and write into KV that only they read.

Not thread-safe: one thread at a time. llama.cpp ends the process if it finds a bug of its own, so arguments are checked
here.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.errors import CheckpointError
from peerd.compute.llamacpp.library import LlamaLibrary
from peerd.compute.llamacpp.span_file import write_span
from peerd.compute.llamacpp.structs import (
    FLASH_ATTENTION,
    LOAD_INTO_MEMORY,
    MAX_SEQUENCES,
    Batch,
    EvalCallback,
    with_values,
)
from peerd.compute.llamacpp.untouched import give_back_zeros
from peerd.protocol.span import Span

Array = NDArray[np.float32]
_CACHE = re.compile(rb"cache_[kv]_l\d+ \(view\)")


class LlamaSpan:
    """The blocks of `span`, with KV for `cells` positions in all. `close` it, or drop it.

    batch: how many positions may run at once. Raises CheckpointError if llama.cpp does not load the blocks, OSError if
    the disk is full, MemoryError.
    """

    def __init__(
        self, library: LlamaLibrary, file: GgufFiles, span: Span, width: int, *, cells: int, batch: int, threads: int
    ) -> None:
        self.span = span
        self.width = width
        self.batch = batch
        self._library = library
        self._calls = library.calls
        self._graph = _Graph(library)
        # llama.cpp keeps a pointer to it.
        self._callback = EvalCallback(self._graph.visit)
        #: What llama.cpp must free, the last first.
        self._owned: list[tuple[Callable[[int], None], int]] = []
        # A process that ends frees everything anyway, and a thread of it may still compute.
        self._freed = weakref.finalize(self, _free, self._owned)
        self._freed.atexit = False
        try:
            self._model = self._load(file)
            self._check_shape(file.path)
            self._context = self._open_context(cells, threads)
            self._memory = self._calls.llama_get_memory(self._context)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<LlamaSpan {self.span} width={self.width}>"

    def close(self) -> None:
        """Free everything. Closing twice does nothing."""
        self._freed()

    def cut(self, sequence: int, length: int = 0) -> None:
        """Forget a sequence's positions from `length` on."""
        if not self._calls.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise RuntimeError(f"llama.cpp cannot cut sequence {sequence} at {length}")

    def fork(self, source: int, target: int, length: int) -> None:
        """Replace a sequence by the first `length` positions of another one, which both then share."""
        if source == target:
            self.cut(source, length)
            return
        self.cut(target)
        if length:
            self._calls.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def run(
        self, hidden: Array, positions: Sequence[int], sequences: Sequence[int], blocks: Span | None = None
    ) -> Array:
        """Run new positions of some sequences through `blocks` (default: all), and keep their keys and values.

        hidden: [n, width], finite; returns the same shape. positions, sequences: one for each; a sequence's positions
        follow the ones that it has. Raises RuntimeError if llama.cpp fails, MemoryError if it has no cells left.
        """
        return self._run(hidden, positions, sequences, blocks or self.span, every=False)[-1]

    def trace(self, hidden: Array, sequence: int) -> list[Array]:
        """Run the first positions of an empty sequence through all blocks. Returns each block's output."""
        count = len(hidden)
        return self._run(hidden, range(count), [sequence] * count, self.span, every=True)

    def give_back_cache(self) -> int:
        """Give the memory of the KV cache back until positions come. No sequence may have any, and `trace` must have
        run. Returns the bytes; 0 on systems that take none back.
        """
        return give_back_zeros(self._graph.caches.values())

    def _run(
        self, hidden: Array, positions: Sequence[int], sequences: Sequence[int], blocks: Span, *, every: bool
    ) -> list[Array]:
        count = len(hidden)
        if not self.span.covers(blocks) or hidden.shape != (count, self.width) or not 1 <= count <= self.batch:
            raise ValueError(f"{hidden.shape} for blocks {blocks} of {self.span}, batches of {self.batch}")
        embeddings = np.ascontiguousarray(hidden, dtype=np.float32)
        first, end = blocks.start - self.span.start, blocks.end - self.span.start
        self._graph.begin(embeddings, first, end, every=every)
        places, ids = np.asarray(positions, np.int32), np.asarray(sequences, np.int32)
        ones, wanted = np.ones(count, np.int32), np.ones(count, np.int8)
        pointers = (ids.ctypes.data + ids.itemsize * np.arange(count)).astype(np.uintp)
        arrays = (embeddings, places, ones, pointers, wanted)
        batch = Batch(count, None, *(array.ctypes.data for array in arrays))
        code = self._calls.llama_decode(self._context, batch)
        return self._result(code)

    def _result(self, code: int) -> list[Array]:
        outputs = self._graph.end()
        if code == 1:
            raise MemoryError("llama.cpp has no free cells in its KV cache")
        if code or outputs is None:
            said = self._library.last_errors()
            raise RuntimeError(f"llama.cpp could not compute blocks {self.span} (code {code}){said and ': '}{said}")
        return outputs

    def _load(self, file: GgufFiles) -> int:
        """Load the blocks by way of a temporary file, which is deleted before this returns."""
        params = with_values(self._calls.llama_model_default_params(), load_mode=LOAD_INTO_MEMORY, n_gpu_layers=0)
        with tempfile.TemporaryDirectory(prefix="peerd-") as folder:
            path = Path(folder) / "span.gguf"
            write_span(file, self.span, path)
            model: int | None = self._calls.llama_model_load_from_file(bytes(path), params)
        if not model:
            raise CheckpointError(
                f"{file.path}: llama.cpp does not load blocks {self.span}: {self._library.last_errors()}"
            )
        self._owned.append((self._calls.llama_model_free, model))
        return model

    def _check_shape(self, path: Path) -> None:
        blocks, width = self._calls.llama_model_n_layer(self._model), self._calls.llama_model_n_embd(self._model)
        if (blocks, width) != (len(self.span), self.width):
            raise CheckpointError(
                f"{path}: llama.cpp finds {blocks} blocks of width {width} in {len(self.span)} of width {self.width}"
            )

    def _open_context(self, cells: int, threads: int) -> int:
        # llama.cpp plans for a position of every sequence in one batch, and ends the process if that is too small.
        batch = max(self.batch, MAX_SEQUENCES)
        params = with_values(
            self._calls.llama_context_default_params(),
            n_ctx=max(cells, batch),
            n_batch=batch,
            n_ubatch=batch,
            n_seq_max=MAX_SEQUENCES,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn_type=FLASH_ATTENTION,
            # All sequences share one cache, so that each may take what the others leave, and a fork copies nothing.
            kv_unified=True,
            cb_eval=self._callback,
        )
        context: int | None = self._calls.llama_init_from_model(self._model, params)
        if not context:
            raise MemoryError(
                f"llama.cpp could not make a KV cache of {cells} positions for blocks {self.span}:"
                f" {self._library.last_errors()}"
            )
        self._owned.append((self._calls.llama_free, context))
        return context


def _free(owned: list[tuple[Callable[[int], None], int]]) -> None:
    while owned:
        free, pointer = owned.pop()
        free(pointer)


class _Graph:
    """Watches one computation: writes its input where it does not begin at the first block, and takes its outputs."""

    def __init__(self, library: LlamaLibrary) -> None:
        self._quick = library.quick
        self._hidden: Array = np.empty((0, 0), np.float32)
        self._input: bytes | None = None
        self._outputs: dict[bytes, Array | None] = {}
        self._last = b""
        self._wrong = False
        self._every = False
        #: Where each block's keys and values lie in memory, (first, end), by the name of the node that writes them.
        #: Known once a run has taken every output.
        self.caches: dict[bytes, tuple[int, int]] = {}

    def begin(self, hidden: Array, first: int, end: int, *, every: bool) -> None:
        """Prepare for blocks `first` to `end - 1` of the span. `every`: take the output of each, not of the last."""
        self._hidden, self._wrong, self._every = hidden, False, every
        self._input = _output_of(first - 1) if first else None
        self._outputs = dict.fromkeys(map(_output_of, range(first if every else end - 1, end)))
        self._last = _output_of(end - 1)

    def end(self) -> list[Array] | None:
        """The outputs; None if the graph had not all of them."""
        found = [output for output in self._outputs.values() if output is not None]
        complete = len(found) == len(self._outputs) and not self._wrong
        self._outputs = {}
        self._hidden = np.empty((0, 0), np.float32)
        return found if complete else None

    def visit(self, tensor: int, ask: bool, _: object) -> bool:
        """llama.cpp asks whether it shall stop behind a node, and again, when the node is computed, to go on."""
        name = self._quick.ggml_get_name(tensor)
        if ask and self._every:
            self._note_cache(name, tensor)
        if ask:
            return name in self._outputs or name == self._input
        if self._quick.ggml_nbytes(tensor) != self._hidden.nbytes:
            self._wrong = True
            return False
        if name == self._input:
            self._quick.ggml_backend_tensor_set(tensor, self._hidden.ctypes.data, 0, self._hidden.nbytes)
            return True
        output = np.empty_like(self._hidden)
        self._quick.ggml_backend_tensor_get(tensor, output.ctypes.data, 0, output.nbytes)
        self._outputs[name] = output
        return bool(name != self._last)

    def _note_cache(self, name: bytes, tensor: int) -> None:
        # The node that writes is a view of the whole cache, those that read are views of its beginning.
        if _CACHE.fullmatch(name):
            first = self._quick.ggml_get_data(tensor)
            end = first + self._quick.ggml_nbytes(tensor)
            self.caches[name] = max(self.caches.get(name, (first, end)), (first, end))


def _output_of(block: int) -> bytes:
    """llama.cpp's name of a block's output."""
    return b"l_out-%d" % block

"""Loads spans of one model as one order wants them, the first time and whenever the span moves.

Knows checkpoints and threads; decides nothing. The difficulty is the model: a branch on a hub may have moved on since
the peer began to serve it, and other weights under the same announcement would break every session.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import torch
import trio

from peerd.checkpoints import Checkpoints, fetch_span
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.errors import CheckpointError
from peerd.compute.heap import trim_heap
from peerd.protocol.messages.session import MAX_LENGTH
from peerd.protocol.span import Span
from peerd.server.engine_task import EngineTask
from peerd.server.server import ServedSpan
from peerd.spans.loading import LoadedSpan, ServeSpec, load

# torch has a class of its own for GPUs that are full, but only words for a host.
_NO_HOST_MEMORY = "can't allocate memory"


class SpanLoader:
    """Loads spans of the model with this digest. `spec` is for one device; `promised_bytes`: what other spans of this
    peer may take of the host's memory yet.
    """

    def __init__(
        self, checkpoints: Checkpoints, spec: ServeSpec, digest: bytes, promised_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        self._checkpoints = checkpoints
        self._spec = spec
        self._digest = digest
        self._promised_bytes = promised_bytes

    async def on_disk(self) -> frozenset[int]:
        """The blocks that need not be fetched. Raises CheckpointError."""
        async with self._open() as checkpoint:
            return await trio.to_thread.run_sync(lambda: checkpoint.blocks_on_disk)

    async def fetch(self, span: Span) -> None:
        """Have the span's files on this machine. Raises CheckpointError."""
        async with self._open() as checkpoint:
            await fetch_span(checkpoint, span)

    async def load(self, span: Span) -> tuple[ServedSpan, LoadedSpan]:
        """An engine over the span. Raises CheckpointError, InvalidRequest, OSError, torch.OutOfMemoryError."""
        async with self._open() as checkpoint:
            await fetch_span(checkpoint, span)
            spec = replace(self._spec, promised_bytes=self._promised_bytes())
            return await load_served(spec, checkpoint, span)

    async def free(self) -> None:
        """Give back what no engine uses any more, or the next would find no room."""
        await trio.to_thread.run_sync(_free, self._spec.device)

    def with_adapter(self, name: str, path: str | Path) -> None:
        """Load this adapter too from now on."""
        self._spec = replace(self._spec, adapters=(*self._spec.adapters, (name, path)))

    def without_adapter(self, name: str) -> None:
        """Load this adapter no more."""
        self._spec = replace(self._spec, adapters=tuple(pair for pair in self._spec.adapters if pair[0] != name))

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Checkpoint]:
        async with self._checkpoints.open(self._spec.model, self._spec.revision) as checkpoint:
            digest = await trio.to_thread.run_sync(lambda: checkpoint.model_digest)
            if digest != self._digest:
                raise CheckpointError(
                    f"{checkpoint.name} is not what it was when this peer began to serve it: start the peer again"
                )
            yield checkpoint


async def load_served(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> tuple[ServedSpan, LoadedSpan]:
    """An engine over blocks that are here, and its task. Raises as `serving.load`, and MemoryError."""
    try:
        loaded = await trio.to_thread.run_sync(load, spec, checkpoint, span)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _NO_HOST_MEMORY not in str(error):
            raise
        raise MemoryError(f"blocks {span} do not fit into the memory that is free: {error}") from None
    max_length = checkpoint.max_length or MAX_LENGTH
    return ServedSpan(checkpoint.model_digest, max_length, EngineTask(loaded.engine), loaded.adapter_room), loaded


def _free(device: str) -> None:
    # Models hold themselves, and so do the errors of a load that failed.
    gc.collect()
    if torch.device(device).type == "cuda":
        # What torch keeps for its next tensors would count as taken.
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    trim_heap()

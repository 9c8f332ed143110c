"""Loads a span for serving: its blocks, its adapters, and its KV pool, sized by `budget.py`.

Everything here blocks, because it reads gigabytes, so the peer runs it in a worker thread.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import trio

from peerd.checkpoints import Checkpoints, fetch_head, fetch_span
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.device.failures import is_out_of_memory
from peerd.compute.device.free_memory import free_memory, give_back_memory, trim_heap
from peerd.compute.device.sizes import format_size
from peerd.compute.engine.engine import BaseEngine, Engine
from peerd.compute.engine.self_test import check_span
from peerd.compute.engine.throughput import measured_throughput
from peerd.compute.errors import CheckpointError
from peerd.compute.families.family import Family
from peerd.compute.llamacpp.library import package_version
from peerd.compute.llamacpp.loading import load_llama_engine
from peerd.compute.model.head import load_output_side, output_side_bytes
from peerd.compute.model.span_model import load_span
from peerd.compute.model.stored_as import packing_notes
from peerd.compute.quantized.formats import NONE, PACKED
from peerd.compute.training.memory import PassMemory
from peerd.exchange.head_task import HeadTask
from peerd.protocol.encoding.tensors import CODECS, DTYPE_NAMES
from peerd.protocol.messages.session import MAX_LENGTH
from peerd.protocol.records.envelope import ServerRecord, block_roots
from peerd.protocol.span import Span
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import AdapterRoom
from peerd.server.served_head import POSITIONS_AT_ONCE, ServedHead
from peerd.server.served_spans import ServedSpan
from peerd.spans.adapters import load_adapter, read_adapter
from peerd.spans.budget import (
    batch_tokens_of,
    client_adapter_bytes_of,
    dtype_of,
    engine_of,
    kv_tokens_of,
    memory_budget,
    numerics_of,
    pass_bytes_of,
    promised_bytes_of,
    quantization_of,
    serves_head,
)
from peerd.spans.spec import LLAMACPP, ServeSpec

log = logging.getLogger(__name__)

# The share of the memory that is still free after loading that training may take. Unwritten KV counts as free there.
SPARE_PASS_SHARE = 0.25
# Enough for 4096 positions of the largest models.
MAX_PASS_BYTES = 8 * 2**30
# How the log names the ways of storing weights, but for those of `--quantize int8` and `nf4`.
_WEIGHTS = {NONE: "", PACKED: ", weights packed as published", LLAMACPP: ", weights as published, by llama.cpp"}


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """An engine with its blocks and adapters, and the facts that are announced about them."""

    engine: BaseEngine
    dtype: str
    quantization: str
    codecs: tuple[str, ...]
    throughput: float
    roots: tuple[bytes, ...]
    adapter_room: AdapterRoom
    family: Family
    uplink: float = 0.0
    #: What draws tokens here; None where no head is served.
    head: ServedHead | None = None
    #: The host memory that it may still take: the system does not see KV that was never written.
    promised_bytes: int = 0


def expected_record(spec: ServeSpec, checkpoint: Checkpoint) -> ServerRecord:
    """The part of a span's announcement that is known before anything is loaded. `spec` is for one device.

    Raises InvalidRequest.
    """
    dtype, stored_as = numerics_of(spec, checkpoint)
    return ServerRecord(
        seq=0,
        expires=0.0,
        model=checkpoint.model_digest,
        span=Span(0, 1),
        state="joining",
        dtype=DTYPE_NAMES[dtype],
        quantization=stored_as,
        codecs=tuple(sorted(CODECS)),
        throughput=spec.throughput or 0.0,
        free_tokens=0,
        max_length=checkpoint.max_length or MAX_LENGTH,
    )


def load(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> LoadedSpan:
    """Read the span's blocks, make its engine and measure its speed. Raises CheckpointError, InvalidRequest."""
    dtype, stored_as = numerics_of(spec, checkpoint)
    is_llama = engine_of(spec, checkpoint) == LLAMACPP
    engine = _load_llama(spec, checkpoint, span) if is_llama else _load_torch(spec, checkpoint, span)
    digests = [checkpoint.block_digest(block) for block in range(span.start, span.end)]
    measured_as = f"{stored_as} {package_version()}" if is_llama else stored_as
    throughput = spec.throughput or spec.share * measured_throughput(
        engine, checkpoint.model_digest, dtype, measured_as, torch.device(spec.device), checkpoint.max_length
    )
    log.info(
        "blocks %s of %s: %s%s, KV for %d positions, %.0f positions a second through a block%s",
        span,
        checkpoint.name,
        DTYPE_NAMES[dtype],
        _WEIGHTS.get(stored_as, f", weights in {stored_as}"),
        engine.total_tokens,
        throughput,
        ", as --throughput says" if spec.throughput else "",
    )
    room = AdapterRoom(0 if is_llama else client_adapter_bytes_of(spec), value_bytes=dtype.itemsize)
    return LoadedSpan(
        engine,
        DTYPE_NAMES[dtype],
        stored_as,
        tuple(sorted(CODECS)),
        throughput,
        block_roots(span, digests),
        room,
        checkpoint.family,
        float(spec.uplink or 0),
        _load_head(spec, checkpoint, span),
        promised_bytes_of(spec, checkpoint, engine, room),
    )


def _load_head(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> ServedHead | None:
    if not serves_head(spec, checkpoint, span):
        return None
    head = load_output_side(checkpoint, device=spec.device)
    head.make_shortlist()
    log.info("the head of %s is served too: it takes %s", checkpoint.name, format_size(output_side_bytes(checkpoint)))
    return ServedHead(HeadTask(head, positions_at_once=POSITIONS_AT_ONCE))


def _load_llama(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> BaseEngine:
    kv_tokens = kv_tokens_of(spec, checkpoint, span)
    engine = load_llama_engine(checkpoint, span, kv_tokens=kv_tokens, batch_tokens=batch_tokens_of(spec))
    # What llama.cpp was compared with is no longer needed.
    trim_heap()
    return engine


def _load_torch(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> BaseEngine:
    dtype, quantize = dtype_of(spec, checkpoint), quantization_of(spec, checkpoint)
    # Computed before anything is read, so that a span that does not fit is refused early.
    kv_tokens, pass_bytes = kv_tokens_of(spec, checkpoint, span), pass_bytes_of(spec)
    digest = None if spec.any_base else checkpoint.model_digest
    adapters = [
        read_adapter(name, path, checkpoint.family, span, spec.hub, model_digest=digest) for name, path in spec.adapters
    ]
    if checkpoint.packing:
        log.info(
            "blocks %s of %s are stored as %s: read as %s, they take %s",
            span,
            checkpoint.name,
            checkpoint.packing,
            DTYPE_NAMES[dtype] if quantize == NONE else quantize,
            format_size(memory_budget(spec, checkpoint, span).blocks),
        )
    model = load_span(
        checkpoint, span, device=spec.device, dtype=dtype, attention=register_attention(), quantize=quantize
    )
    for note in packing_notes(checkpoint, span.start, model.layers, quantize):
        log.info("blocks %s of %s: %s", span, checkpoint.name, note)
    engine = Engine(model, kv_tokens=kv_tokens, batch_tokens=batch_tokens_of(spec), pass_bytes=pass_bytes)
    check_span(engine, model, quantize)
    for adapter in adapters:
        load_adapter(engine, adapter)
    # The engine has reordered weights, which leaves free memory in the heap.
    trim_heap()
    if spec.memory_bytes is None and engine.passes is not None:
        # A tape saves the backward a forward, so memory that is free anyway is used for tapes.
        spare_bytes = min(MAX_PASS_BYTES, int(free_memory(spec.device) * SPARE_PASS_SHARE))
        engine.passes.memory = PassMemory(max(pass_bytes, spare_bytes))
    engine.warm_up()
    return engine


class SpanLoader:
    """Loads spans of the model with this digest. `spec` is for one device.

    promised_bytes: returns the host memory that other spans of this peer may still take.
    """

    def __init__(
        self, checkpoints: Checkpoints, spec: ServeSpec, digest: bytes, promised_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        self._checkpoints = checkpoints
        self._spec = spec
        self._digest = digest
        self.promised_bytes_of = promised_bytes

    @property
    def spec(self) -> ServeSpec:
        """The operator's wishes, as they are now."""
        return self._spec

    async def on_disk(self) -> frozenset[int]:
        """The blocks that need no download. Raises CheckpointError."""
        async with self.open() as checkpoint:
            return await trio.to_thread.run_sync(lambda: checkpoint.blocks_on_disk)

    async def fetch(self, span: Span) -> None:
        """Download the span's files to this machine. Raises CheckpointError."""
        async with self.open() as checkpoint:
            await fetch_served(self._spec, checkpoint, span)

    async def load(self, span: Span) -> tuple[ServedSpan, LoadedSpan]:
        """Load an engine over the span. Raises CheckpointError, InvalidRequest, OSError, MemoryError,
        torch.OutOfMemoryError.
        """
        async with self.open() as checkpoint:
            await fetch_served(self._spec, checkpoint, span)
            spec = replace(self._spec, promised_bytes=self.promised_bytes_of())
            return await load_served(spec, checkpoint, span)

    async def free(self) -> None:
        """Free what no engine uses any more, to make room for the next one."""
        await trio.to_thread.run_sync(give_back_memory, self._spec.device)

    def with_adapter(self, name: str, path: str | Path) -> None:
        """Load this adapter too, from now on."""
        self._spec = replace(self._spec, adapters=(*self._spec.adapters, (name, path)))

    def without_adapter(self, name: str) -> None:
        """Load this adapter no longer."""
        self._spec = replace(self._spec, adapters=tuple(pair for pair in self._spec.adapters if pair[0] != name))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Checkpoint]:
        """The model's checkpoint. Raises CheckpointError if it is no longer the one that is served."""
        async with self._checkpoints.open(self._spec.model, self._spec.revision) as checkpoint:
            digest = await trio.to_thread.run_sync(lambda: checkpoint.model_digest)
            if digest != self._digest:
                raise CheckpointError(
                    f"{checkpoint.name} has changed since this peer began to serve it: restart the peer"
                )
            yield checkpoint


async def fetch_served(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> None:
    """Download what is needed to serve the span. Raises CheckpointError."""
    await fetch_span(checkpoint, span)
    if serves_head(spec, checkpoint, span):
        await fetch_head(checkpoint)


async def load_served(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> tuple[ServedSpan, LoadedSpan]:
    """Make an engine over blocks whose files are on this machine, and its task. Raises as `load`, and MemoryError."""
    try:
        loaded = await trio.to_thread.run_sync(load, spec, checkpoint, span)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise MemoryError(f"blocks {span} do not fit into the memory that is free: {error}") from None
    # Loading cannot be interrupted. If this was cancelled meanwhile, the server may have ended, which is to serve it.
    await trio.lowlevel.checkpoint_if_cancelled()
    max_length = checkpoint.max_length or MAX_LENGTH
    task = EngineTask(loaded.engine)
    task.share = spec.share
    if loaded.head is not None:
        loaded.head.worked = task.note_turn
    return ServedSpan(checkpoint.model_digest, max_length, task, loaded.adapter_room, loaded.head), loaded

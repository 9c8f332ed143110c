"""Gets a span ready to serve: which blocks, read from where, with how much KV.

Knows checkpoints, memory and engines; knows no network. Everything here blocks (it reads gigabytes), so
the peer runs it in a worker thread.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import trio

from peerd.checkpoints import Checkpoints, fetch_span
from peerd.compute.adapters.file import AdapterFile, open_adapter
from peerd.compute.adapters.lora import Lora
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.device.free_memory import free_memory, trim_heap
from peerd.compute.device.sizes import format_size
from peerd.compute.engine.capacity import (
    HEADROOM,
    Budget,
    block_bytes,
    default_kv_tokens,
    fits,
    fits_on_disk,
    span_budget,
)
from peerd.compute.engine.engine import PASS_BYTES, Engine
from peerd.compute.engine.throughput import measured_throughput
from peerd.compute.errors import AdapterError, CheckpointError
from peerd.compute.families.family import Family
from peerd.compute.kv.layout import BATCH_TOKENS, PAGE_TOKENS
from peerd.compute.model.span_model import load_span
from peerd.compute.quantized.bitsandbytes_import import load_bitsandbytes
from peerd.compute.quantized.formats import NONE, QUANTIZATIONS
from peerd.compute.training.memory import PassMemory
from peerd.exchange.adapter_upload import AdapterRoom
from peerd.protocol.encoding.tensors import CODECS, DTYPE_NAMES, DTYPES
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.messages.adapters import adapter_id, check_name, name_of
from peerd.protocol.messages.session import MAX_LENGTH
from peerd.protocol.records.envelope import ServerRecord, block_roots
from peerd.protocol.span import Span
from peerd.server.engine_task import EngineTask
from peerd.server.server import ServedSpan
from peerd.spans.spec import ServeSpec

log = logging.getLogger(__name__)

# Enough for 16 sessions of 4096 positions; more than that an operator asks for.
DEFAULT_KV_TOKENS = 65536
# Of what is free beside the blocks, what KV may take where nobody said how much memory is ours.
KV_SHARE = 0.5
# A LoRA of rank 16 on every linear layer of 12 blocks of a 7B model in bf16 takes 30 MB.
DEFAULT_CLIENT_ADAPTER_BYTES = 64 * 10**6
# Positions a batch may have on a GPU. A GPU reads its weights, and dequantizes them, once a batch: an H200 has read a
# block in the time in which it multiplies it by some 200 positions, and dequantizing takes twice as long again.
GPU_BATCH_TOKENS = 1024
# Of all memory, what one client's adapter may take by default; four at once are a sixteenth.
CLIENT_ADAPTER_SHARE = 1 / 64
# Of all memory, what training passes may take at most. Inference is what most peers are asked for.
PASS_SHARE = 1 / 16
# Of what is still free once blocks are loaded, what training may take: KV that is not in use yet counts as free there.
SPARE_PASS_SHARE = 0.25
# 4096 positions of the largest models; more would help nobody.
MAX_PASS_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """An engine with its blocks and adapters, and what others are told of them."""

    engine: Engine
    dtype: str
    quantization: str
    codecs: tuple[str, ...]
    throughput: float
    roots: tuple[bytes, ...]
    adapter_room: AdapterRoom
    family: Family
    uplink: float = 0.0
    #: What it may take of the host's memory beyond what it has: of KV that was never written the system knows nothing.
    promised_bytes: int = 0


def how_many_blocks(spec: ServeSpec, checkpoint: Checkpoint) -> int:
    """How many blocks to serve where no span was named. Raises InvalidRequest where none fits."""
    if isinstance(spec.blocks, int):
        if not 1 <= spec.blocks <= checkpoint.block_count:
            raise InvalidRequest(f"{checkpoint.name} has {checkpoint.block_count} blocks, not {spec.blocks}")
        return spec.blocks
    dtype, room = _dtype(spec, checkpoint), _room(spec, checkpoint)
    count = fits(
        checkpoint,
        room,
        dtype=dtype,
        batch_tokens=_batch_tokens(spec),
        kv_tokens=spec.kv_tokens or 0,
        quantize=_quantization(spec),
        on_host=_on_host(spec),
    )
    if count < 1:
        tokens = spec.kv_tokens or default_kv_tokens(checkpoint)
        budget = _budget(spec, checkpoint, 1)
        raise InvalidRequest(
            f"to serve one block of {checkpoint.name} with KV for {tokens} positions takes"
            f" {format_size(budget.total(tokens, on_host=_on_host(spec)))}"
            f" (the block itself {format_size(block_bytes(checkpoint, dtype, spec.quantize))}),"
            f" {format_size(room)} are {'given' if spec.memory_bytes else 'free'}: {_remedy(spec)}"
        )
    return fits_on_disk(checkpoint, count)


def expected_record(spec: ServeSpec, checkpoint: Checkpoint) -> ServerRecord:
    """As much as is known, before anything is loaded, of what a span will be announced as. Raises InvalidRequest."""
    return ServerRecord(
        seq=0,
        expires=0.0,
        model=checkpoint.model_digest,
        span=Span(0, 1),
        state="joining",
        dtype=DTYPE_NAMES[_dtype(spec, checkpoint)],
        quantization=_quantization(spec),
        codecs=tuple(sorted(CODECS)),
        throughput=spec.throughput or 0.0,
        free_tokens=0,
        max_length=checkpoint.max_length or MAX_LENGTH,
    )


def load(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> LoadedSpan:
    """Read the span's blocks, make its engine and time it. Raises CheckpointError, InvalidRequest."""
    dtype, quantize = _dtype(spec, checkpoint), _quantization(spec)
    # Decided before anything is read: afterwards it would be too late to say that it does not fit.
    kv_tokens, pass_bytes = _kv_tokens(spec, checkpoint, span), _pass_bytes(spec)
    model = load_span(
        checkpoint, span, device=spec.device, dtype=dtype, attention=register_attention(), quantize=quantize
    )
    engine = Engine(model, kv_tokens=kv_tokens, batch_tokens=_batch_tokens(spec), pass_bytes=pass_bytes)
    for name, path in spec.adapters:
        load_adapter(engine, read_adapter(name, path, checkpoint.family, span))
    # The engine reorders weights.
    trim_heap()
    if spec.memory_bytes is None and engine.passes is not None:
        # Graphs that wait for their backward save it a forward: use what is free anyway.
        spare_bytes = min(MAX_PASS_BYTES, int(free_memory(spec.device) * SPARE_PASS_SHARE))
        engine.passes.memory = PassMemory(max(pass_bytes, spare_bytes))
    engine.warm_up()
    digests = [checkpoint.block_digest(block) for block in range(span.start, span.end)]
    throughput = spec.throughput or measured_throughput(engine, checkpoint.model_digest, dtype, quantize, model.device)
    log.info(
        "blocks %s of %s: %s%s, KV for %d positions, %.0f positions a second through a block%s",
        span,
        checkpoint.name,
        DTYPE_NAMES[dtype],
        "" if quantize == NONE else f", weights in {quantize}",
        engine.total_tokens,
        throughput,
        ", as --throughput says" if spec.throughput else "",
    )
    room = AdapterRoom(_client_adapter_bytes(spec), value_bytes=dtype.itemsize)
    return LoadedSpan(
        engine,
        DTYPE_NAMES[dtype],
        quantize,
        tuple(sorted(CODECS)),
        throughput,
        block_roots(span, digests),
        room,
        checkpoint.family,
        float(spec.uplink or 0),
        _promised_bytes(spec, checkpoint, engine, room),
    )


def _promised_bytes(spec: ServeSpec, checkpoint: Checkpoint, engine: Engine, room: AdapterRoom) -> int:
    """What a span that has just been loaded may take of the host's memory yet."""
    budget, on_host = _budget(spec, checkpoint, engine.span), _on_host(spec)
    promised = engine.total_tokens * budget.host_per_token
    if on_host:
        passes = engine.passes.memory.total_bytes if engine.passes is not None else 0
        promised += engine.total_tokens * budget.kv_per_token + budget.working + room.total_bytes + passes
    return promised


@dataclass(frozen=True, slots=True, eq=False)
class ReadAdapter:
    """An adapter's weights for a span, on the CPU, under the id that they are served as."""

    id: str
    file: AdapterFile
    weights: Lora


def read_adapter(name: str, path: str | Path, family: Family, span: Span) -> ReadAdapter:
    """Read what a span needs of an adapter. Raises AdapterError."""
    try:
        check_name(name)
    except ValueError as error:
        raise AdapterError(str(error)) from None
    with open_adapter(path, family) as file:
        return ReadAdapter(adapter_id(name, file.digest), file, file.read(span))


def load_adapter(engine: Engine, adapter: ReadAdapter) -> None:
    """Give it to the engine. Device thread. Raises AdapterError."""
    name = name_of(adapter.id)
    if name in {name_of(other) for other in engine.adapters}:
        raise AdapterError(f"there is an adapter called {name} already: give {adapter.file.path} another name")
    engine.load_adapter_file(adapter.id, adapter.file, adapter.weights)


def _client_adapter_bytes(spec: ServeSpec) -> int:
    if spec.client_adapter_bytes is not None:
        return spec.client_adapter_bytes
    return min(DEFAULT_CLIENT_ADAPTER_BYTES, int(_given(spec) * CLIENT_ADAPTER_SHARE))


def _adapter_bytes(spec: ServeSpec, checkpoint: Checkpoint, span: Span | None) -> int:
    """What adapters take: those that are served, and clients' own."""
    dtype = _dtype(spec, checkpoint)
    total = AdapterRoom(_client_adapter_bytes(spec)).total_bytes
    for _, path in spec.adapters:
        with open_adapter(path, checkpoint.family) as file:
            total += file.n_values(span) * dtype.itemsize
    return total


def _dtype(spec: ServeSpec, checkpoint: Checkpoint) -> torch.dtype:
    if spec.dtype is None:
        return checkpoint.dtype
    if spec.dtype not in DTYPES:
        raise InvalidRequest(f"dtype {spec.dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[spec.dtype]


def _quantization(spec: ServeSpec) -> str:
    if spec.quantize not in QUANTIZATIONS:
        raise InvalidRequest(f"quantization {spec.quantize!r} is not one of {', '.join(QUANTIZATIONS)}")
    if spec.quantize == "nf4":
        # Before memory is looked at: the package itself takes a good deal of it.
        load_bitsandbytes()
    return spec.quantize


def _batch_tokens(spec: ServeSpec) -> int:
    return BATCH_TOKENS if _on_host(spec) else GPU_BATCH_TOKENS


def _on_host(spec: ServeSpec) -> bool:
    return torch.device(spec.device).type == "cpu"


def _given(spec: ServeSpec) -> int:
    """How many bytes of the device may be taken."""
    if spec.memory_bytes:
        return spec.memory_bytes
    free = free_memory(spec.device) - (spec.promised_bytes if _on_host(spec) else 0)
    return max(0, int(free * (1 - HEADROOM)))


def _room(spec: ServeSpec, checkpoint: Checkpoint, span: Span | None = None) -> int:
    """How many of them blocks and KV may take: what adapters of `span` (default: all blocks) take is set aside, and
    what training passes may.
    """
    return _given(spec) - _adapter_bytes(spec, checkpoint, span) - _pass_bytes(spec)


def _pass_bytes(spec: ServeSpec) -> int:
    """What training passes may take."""
    return min(PASS_BYTES, int(_given(spec) * PASS_SHARE))


def _budget(spec: ServeSpec, checkpoint: Checkpoint, span: Span | int) -> Budget:
    dtype = _dtype(spec, checkpoint)
    return span_budget(
        checkpoint, span, dtype, _quantization(spec), batch_tokens=_batch_tokens(spec), on_host=_on_host(spec)
    )


def _kv_tokens(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> int:
    """Positions of KV for the span. Raises InvalidRequest where what was asked for does not fit."""
    budget, room, on_host = _budget(spec, checkpoint, span), _room(spec, checkpoint, span), _on_host(spec)
    fit = budget.kv_tokens_in(room, on_host=on_host)
    if not on_host:
        # The device holds the KV, but the host what sessions keep of their activations.
        host = int((free_memory() - spec.promised_bytes) * (1 - HEADROOM)) - budget.process
        fit = min(fit, host // budget.host_per_token)
    wanted = spec.kv_tokens or PAGE_TOKENS
    if fit < wanted:
        raise InvalidRequest(
            f"blocks {span} with KV for {wanted} positions take"
            f" {format_size(budget.total(wanted, on_host=on_host))} ({format_size(budget.blocks)} the blocks),"
            f" {format_size(room)} are {'given' if spec.memory_bytes else 'free'}: {_remedy(spec)}"
        )
    if spec.kv_tokens is not None:
        return spec.kv_tokens
    if spec.memory_bytes is None:
        # Others on this machine want some of what is free; but a conversation's worth is what we are here for.
        fit = max(int(fit * KV_SHARE), min(fit, default_kv_tokens(checkpoint)))
    return min(DEFAULT_KV_TOKENS, fit)


def _remedy(spec: ServeSpec) -> str:
    """What an operator can do about too little memory."""
    ways = ["serve fewer blocks", "raise --memory" if spec.memory_bytes else "free some memory"]
    if spec.kv_tokens:
        ways.append("lower --kv-tokens")
    if spec.quantize == NONE:
        ways.append("serve with --quantize int8 or nf4")
    return ", ".join(ways[:-1]) + f" or {ways[-1]}"


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

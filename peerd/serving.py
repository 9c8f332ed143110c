"""Gets a span ready to serve: which blocks, read from where, with how much KV.

Knows checkpoints, memory and engines; knows no network. Everything here blocks (it reads gigabytes), so
the peer runs it in a worker thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from peerd.compute.attention import register_attention
from peerd.compute.capacity import block_bytes, fits, free_memory, kv_bytes_per_token
from peerd.compute.checkpoint import Checkpoint
from peerd.compute.engine import Engine
from peerd.compute.span_model import load_span
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.records import block_roots
from peerd.protocol.span import Span
from peerd.protocol.tensors import CODECS, DTYPE_NAMES, DTYPES
from peerd.sizes import format_size

# Enough for 16 sessions of 4096 positions; more than that an operator asks for.
DEFAULT_KV_TOKENS = 65536
# Of the memory that is left beside the blocks, what KV may take by default.
KV_SHARE = 0.5
_WARM_UP_PASSES = 2
_TIMED_PASSES = 8


@dataclass(frozen=True, slots=True)
class ServeSpec:
    """What an operator wants served. `blocks`: a span, how many, or None for all that fit.

    `dtype` defaults to the checkpoint's; `memory_bytes` bounds blocks and KV together, on each device. `device` is
    torch's name; several, with commas between them, divide the blocks (`open_peer` and `Peer.serve` see to that).
    """

    model: str | Path
    blocks: Span | int | None = None
    dtype: str | None = None
    device: str = "cpu"
    kv_tokens: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """An engine with its blocks, and what others are told of them."""

    engine: Engine
    dtype: str
    codecs: tuple[str, ...]
    throughput: float
    roots: tuple[bytes, ...]


def how_many_blocks(spec: ServeSpec, checkpoint: Checkpoint) -> int:
    """How many blocks to serve where no span was named. Raises InvalidRequest where none fits."""
    if isinstance(spec.blocks, int):
        if not 1 <= spec.blocks <= checkpoint.block_count:
            raise InvalidRequest(f"{checkpoint.name} has {checkpoint.block_count} blocks, not {spec.blocks}")
        return spec.blocks
    dtype = _dtype(spec, checkpoint)
    room = spec.memory_bytes or free_memory(spec.device)
    count = fits(checkpoint, room, dtype=dtype, kv_tokens=spec.kv_tokens or 0)
    if count < 1:
        raise InvalidRequest(
            f"one block of {checkpoint.name} takes {format_size(block_bytes(checkpoint, dtype))},"
            f" {format_size(room)} are free:"
            " free some memory or raise --memory"
        )
    return min(count, checkpoint.block_count)


def load(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> LoadedSpan:
    """Read the span's blocks, make its engine and time it. Raises CheckpointError, InvalidRequest."""
    dtype = _dtype(spec, checkpoint)
    model = load_span(checkpoint, span, device=spec.device, dtype=dtype, attention=register_attention())
    engine = Engine(model, kv_tokens=_kv_tokens(spec, checkpoint, span, dtype))
    digests = [checkpoint.block_digest(block) for block in range(span.start, span.end)]
    return LoadedSpan(
        engine, DTYPE_NAMES[dtype], tuple(sorted(CODECS)), _throughput(engine, len(span)), block_roots(span, digests)
    )


def _dtype(spec: ServeSpec, checkpoint: Checkpoint) -> torch.dtype:
    if spec.dtype is None:
        return checkpoint.dtype
    if spec.dtype not in DTYPES:
        raise InvalidRequest(f"dtype {spec.dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[spec.dtype]


def _kv_tokens(spec: ServeSpec, checkpoint: Checkpoint, span: Span, dtype: torch.dtype) -> int:
    per_token = kv_bytes_per_token(checkpoint, dtype) * len(span)
    if spec.kv_tokens is not None:
        return spec.kv_tokens
    if spec.memory_bytes is not None:
        room = spec.memory_bytes - block_bytes(checkpoint, dtype) * len(span)
    else:
        room = int(free_memory(spec.device) * KV_SHARE)
    if room < per_token:
        raise InvalidRequest(f"no memory is left for KV beside blocks {span}: serve fewer blocks or raise --memory")
    return min(DEFAULT_KV_TOKENS, room // per_token)


def _throughput(engine: Engine, blocks: int) -> float:
    """Positions a second that one block does at batch 1, without cache: what announcements say."""
    hidden = torch.zeros(1, 1, engine.hidden_size)
    for _ in range(_WARM_UP_PASSES):
        engine.forward(hidden)
    started = time.perf_counter()
    for _ in range(_TIMED_PASSES):
        engine.forward(hidden)
    return _TIMED_PASSES * blocks / (time.perf_counter() - started)

"""Computes how much memory serving may take, and how many blocks fit into it."""

from __future__ import annotations

from functools import partial

import torch

from peerd.compute.adapters.file import open_adapter
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.device.free_memory import free_memory
from peerd.compute.device.sizes import format_size
from peerd.compute.engine.capacity import (
    HEADROOM,
    Budget,
    default_kv_tokens,
    fits_on_disk,
    fitting,
    least_kv_tokens,
    span_budget,
)
from peerd.compute.engine.engine import PASS_BYTES, BaseEngine
from peerd.compute.kv.layout import BATCH_TOKENS
from peerd.compute.llamacpp.budget import llama_budget
from peerd.compute.llamacpp.library import is_usable, load_library
from peerd.compute.llamacpp.supported import is_quantized, why_not
from peerd.compute.llamacpp.untouched import TAKES_BACK
from peerd.compute.model.head import output_side_bytes
from peerd.compute.model.stored_as import has_grids
from peerd.compute.quantized.bitsandbytes_import import check_bitsandbytes
from peerd.compute.quantized.formats import NONE, PACKED, QUANTIZATIONS
from peerd.compute.quantized.product_choice import packed_is_faster
from peerd.protocol.encoding.tensors import DTYPES
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.span import Span
from peerd.server.quotas import AdapterRoom
from peerd.server.served_head import POSITIONS_AT_ONCE
from peerd.spans.spec import AUTO, ENGINES, LLAMACPP, TORCH, ServeSpec

# llama.cpp plans its buffers for a batch that sees all of its cache, and on some systems the whole cache takes memory.
LLAMA_KV_TOKENS = 16384


# If the operator gives no limit, KV may take this share of the memory that is free beside the blocks.
KV_SHARE = 0.5


# A LoRA of rank 16 on every linear layer of 12 blocks of a 7B model in bf16 takes 30 MB.
DEFAULT_CLIENT_ADAPTER_BYTES = 64 * 10**6


# Positions that a batch may have on a GPU. A GPU reads its weights, and dequantizes them, once a batch. An H200 reads a
# block in the time in which it multiplies it by some 200 positions, and dequantizing takes twice as long again.
GPU_BATCH_TOKENS = 1024


# The default limit for one client's adapter, as a share of all memory; four clients at once take a sixteenth.
CLIENT_ADAPTER_SHARE = 1 / 64


# The share of all memory that training passes may take at most. Most peers are asked mainly for inference.
PASS_SHARE = 1 / 16


# The head is served without being asked for if it takes at most this share of the memory, as training does.
HEAD_SHARE = 1 / 16


def serves_head(spec: ServeSpec, checkpoint: Checkpoint, span: Span | None = None) -> bool:
    """Whether the model's head is served beside `span` (None: beside blocks that are not chosen yet)."""
    if span is not None and span.end < checkpoint.block_count:
        return False
    if spec.head is None:
        return output_side_bytes(checkpoint) <= given_bytes_of(spec) * HEAD_SHARE
    return spec.head


def _head_bytes(spec: ServeSpec, checkpoint: Checkpoint, span: Span | None) -> int:
    """What the head takes: its matrix, and the logits of the positions that it computes at once, twice for a draw."""
    if not serves_head(spec, checkpoint, span):
        return 0
    return output_side_bytes(checkpoint) + 2 * POSITIONS_AT_ONCE * int(checkpoint.config.vocab_size) * 4


def how_many_blocks(spec: ServeSpec, checkpoint: Checkpoint) -> int:
    """How many blocks to serve if the operator names no span. Raises InvalidRequest if none fits."""
    if isinstance(spec.blocks, int):
        if not 1 <= spec.blocks <= checkpoint.block_count:
            raise InvalidRequest(f"{checkpoint.name} has {checkpoint.block_count} blocks, not {spec.blocks}")
        return spec.blocks
    room = _room(spec, checkpoint)
    tokens = spec.kv_tokens or default_kv_tokens(checkpoint, dtype_of(spec, checkpoint))
    count = fitting(
        partial(memory_budget, spec, checkpoint), room, tokens, checkpoint.block_count, on_host=_on_host(spec)
    )
    if count < 1:
        budget = memory_budget(spec, checkpoint, 1)
        raise InvalidRequest(
            f"to serve one block of {checkpoint.name} with KV for {tokens} positions takes"
            f" {format_size(budget.total(tokens, on_host=_on_host(spec)))}"
            f" (the block itself {format_size(budget.blocks)}),"
            f" {format_size(room)} are {'given' if spec.memory_bytes else 'free'}: {_remedy(spec, checkpoint)}"
        )
    return fits_on_disk(checkpoint, count)


def promised_bytes_of(spec: ServeSpec, checkpoint: Checkpoint, engine: BaseEngine, room: AdapterRoom) -> int:
    """The host memory that a loaded span may still take."""
    budget, on_host = memory_budget(spec, checkpoint, engine.span), _on_host(spec)
    promised = engine.total_tokens * budget.host_per_token
    if on_host:
        passes = engine.passes.memory.total_bytes if engine.passes is not None else 0
        working = budget.working_with(engine.total_tokens)
        # llama.cpp has taken the memory for its KV already, where the system does not take it back.
        is_taken = engine_of(spec, checkpoint) == LLAMACPP and not TAKES_BACK
        kv = 0 if is_taken else engine.total_tokens * budget.kv_per_token
        promised += kv + working + room.total_bytes + passes
    return promised


def client_adapter_bytes_of(spec: ServeSpec) -> int:
    if spec.client_adapter_bytes is not None:
        return spec.client_adapter_bytes
    return min(DEFAULT_CLIENT_ADAPTER_BYTES, int(given_bytes_of(spec) * CLIENT_ADAPTER_SHARE))


def _adapter_bytes(spec: ServeSpec, checkpoint: Checkpoint, span: Span | None) -> int:
    """The bytes of adapters: those that are served, and clients' own."""
    if engine_of(spec, checkpoint) == LLAMACPP:
        return 0
    dtype = dtype_of(spec, checkpoint)
    total = AdapterRoom(client_adapter_bytes_of(spec)).total_bytes
    for _, path in spec.adapters:
        with open_adapter(path, checkpoint.family, spec.hub) as file:
            total += file.n_values(span) * dtype.itemsize
    return total


def engine_of(spec: ServeSpec, checkpoint: Checkpoint) -> str:
    """What computes the blocks, TORCH or LLAMACPP.

    Without a wish llama.cpp computes quantized files that torch would dequantize, because it is slow with packed
    weights here or the file's types have no grid. Torch computes all others: with several sessions and long prompts it
    is the faster one. Raises InvalidRequest if the operator wants llama.cpp for what it cannot serve, and
    UnusablePackageError if it does not work here.
    """
    if spec.engine not in ENGINES:
        raise InvalidRequest(f"engine {spec.engine!r} is not one of {', '.join(ENGINES)}")
    if spec.engine == TORCH:
        return TORCH
    reason = _unmet_wish(spec) or why_not(checkpoint)
    if spec.engine == AUTO:
        if reason or not is_quantized(checkpoint) or (has_grids(checkpoint) and packed_is_faster()):
            return TORCH
        return LLAMACPP if is_usable() else TORCH
    if reason:
        raise InvalidRequest(f"llama.cpp cannot serve {checkpoint.name}: it {reason}; leave out --engine llamacpp")
    load_library()
    return LLAMACPP


def _unmet_wish(spec: ServeSpec) -> str:
    """What the operator wants that llama.cpp lacks; empty if nothing."""
    if not _on_host(spec):
        return f"computes on the CPU only, not on {spec.device}"
    wishes = {
        "--dtype": spec.dtype,
        "--quantize": spec.quantize,
        "--adapter": spec.adapters,
        "--client-adapters": spec.client_adapter_bytes,
    }
    given = [name for name, value in wishes.items() if value]
    return f"has no {' and no '.join(given)}" if given else ""


def dtype_of(spec: ServeSpec, checkpoint: Checkpoint) -> torch.dtype:
    if spec.dtype is None:
        # GGUF's values are dequantized to float32, for which a GPU's tensor cores are no use.
        return torch.bfloat16 if checkpoint.is_gguf and not _on_host(spec) else checkpoint.dtype
    if spec.dtype not in DTYPES:
        raise InvalidRequest(f"dtype {spec.dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[spec.dtype]


def quantization_of(spec: ServeSpec, checkpoint: Checkpoint) -> str:
    """How weights are stored. Raises InvalidRequest if the operator's wish cannot be met.

    Without a wish, weights that are published as integers stay packed where the CPU computes faster so. An operator who
    names a dtype wants products in that dtype, which those of packed weights are not.
    """
    if spec.quantize is None:
        is_open = spec.dtype is None and _on_host(spec)
        return PACKED if is_open and has_grids(checkpoint) and packed_is_faster() else NONE
    if spec.quantize not in QUANTIZATIONS:
        raise InvalidRequest(f"quantization {spec.quantize!r} is not one of {', '.join(QUANTIZATIONS)}")
    if spec.quantize == "nf4":
        # Checked before memory is measured, because importing the package takes a good deal of it.
        check_bitsandbytes(spec.device)
    if spec.quantize == PACKED:
        if not _on_host(spec):
            raise InvalidRequest(
                f"packed weights are computed on the CPU only: on {spec.device} serve with --quantize int8 or nf4"
            )
        if not has_grids(checkpoint):
            raise InvalidRequest(
                f"{checkpoint.name} is not stored as integers in groups, as quantized GGUF, AWQ, GPTQ and most"
                " compressed-tensors files are, so there is nothing to keep packed: serve it with --quantize none or"
                " int8"
            )
    return spec.quantize


def numerics_of(spec: ServeSpec, checkpoint: Checkpoint) -> tuple[torch.dtype, str]:
    """The dtype in which results are computed, and how weights are stored, as it is announced."""
    if engine_of(spec, checkpoint) == LLAMACPP:
        return torch.float32, LLAMACPP
    return dtype_of(spec, checkpoint), quantization_of(spec, checkpoint)


def batch_tokens_of(spec: ServeSpec) -> int:
    return BATCH_TOKENS if _on_host(spec) else GPU_BATCH_TOKENS


def _on_host(spec: ServeSpec) -> bool:
    return torch.device(spec.device).type == "cpu"


def given_bytes_of(spec: ServeSpec) -> int:
    """How many bytes of the device may be taken."""
    if spec.memory_bytes:
        return spec.memory_bytes
    free = free_memory(spec.device) - (spec.promised_bytes if _on_host(spec) else 0)
    return max(0, int(free * (1 - HEADROOM)))


def _room(spec: ServeSpec, checkpoint: Checkpoint, span: Span | None = None) -> int:
    """How many of these bytes blocks and KV may take: adapters of `span` (default: all blocks), the head and training
    are subtracted.
    """
    passes = 0 if engine_of(spec, checkpoint) == LLAMACPP else pass_bytes_of(spec)
    beside = _adapter_bytes(spec, checkpoint, span) + _head_bytes(spec, checkpoint, span)
    return given_bytes_of(spec) - beside - passes


def pass_bytes_of(spec: ServeSpec) -> int:
    """The bytes that training passes may take."""
    return min(PASS_BYTES, int(given_bytes_of(spec) * PASS_SHARE))


def memory_budget(spec: ServeSpec, checkpoint: Checkpoint, span: Span | int) -> Budget:
    if engine_of(spec, checkpoint) == LLAMACPP:
        return llama_budget(checkpoint, span, batch_tokens_of(spec))
    dtype = dtype_of(spec, checkpoint)
    return span_budget(
        checkpoint,
        span,
        dtype,
        quantization_of(spec, checkpoint),
        batch_tokens=batch_tokens_of(spec),
        on_host=_on_host(spec),
    )


def kv_tokens_of(spec: ServeSpec, checkpoint: Checkpoint, span: Span) -> int:
    """Positions of KV for the span. Raises InvalidRequest if the requested number does not fit."""
    budget, room, on_host = memory_budget(spec, checkpoint, span), _room(spec, checkpoint, span), _on_host(spec)
    fit = budget.kv_tokens_in(room, on_host=on_host)
    if not on_host:
        # The device holds the KV, but the host holds the activations that sessions keep.
        host = int((free_memory() - spec.promised_bytes) * (1 - HEADROOM)) - budget.process
        fit = min(fit, host // budget.host_per_token)
    least = least_kv_tokens(checkpoint, dtype_of(spec, checkpoint), span)
    wanted = spec.kv_tokens or least
    if wanted < least:
        raise InvalidRequest(f"--kv-tokens {wanted} is less than one session takes in blocks {span}: {least}")
    if fit < wanted:
        raise InvalidRequest(
            f"blocks {span} with KV for {wanted} positions take"
            f" {format_size(budget.total(wanted, on_host=on_host))} ({format_size(budget.blocks)} the blocks),"
            f" {format_size(room)} are {'given' if spec.memory_bytes else 'free'}: {_remedy(spec, checkpoint)}"
        )
    if spec.kv_tokens is not None:
        return spec.kv_tokens
    if spec.memory_bytes is None:
        # Other programs on this machine need some of the free memory, but at least one conversation should fit.
        fit = max(int(fit * KV_SHARE), min(fit, default_kv_tokens(checkpoint, dtype_of(spec, checkpoint), span)))
    return min(LLAMA_KV_TOKENS, fit) if engine_of(spec, checkpoint) == LLAMACPP else fit


def _remedy(spec: ServeSpec, checkpoint: Checkpoint) -> str:
    """What an operator can do about too little memory."""
    packable = _on_host(spec) and has_grids(checkpoint)
    ways = ["serve fewer blocks", "raise --memory" if spec.memory_bytes else "free some memory"]
    if spec.kv_tokens:
        ways.append("lower --kv-tokens")
    if engine_of(spec, checkpoint) == TORCH and quantization_of(spec, checkpoint) == NONE:
        ways.append(f"serve with --quantize {'packed' if packable else 'int8 or nf4'}")
    return ", ".join(ways[:-1]) + f" or {ways[-1]}"

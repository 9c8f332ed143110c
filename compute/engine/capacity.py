"""Computes how much memory serving blocks takes, and how many blocks fit into the free memory.

Weights and KV are counted to the byte; activations and buffers have an upper bound. Nothing may be left out: a peer
that promises more KV than it has memory for dies with all of its sessions, late in a long conversation. Sizes come
from the configuration alone, by building the model without its weights, so no weights file need be there yet.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peerd.compute.checkpoint.packed.pieces import RUN_VALUES
from peerd.compute.families.layer_kinds import LayerKind, layer_kinds
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.families.meta_build import build_on_meta
from peerd.compute.kv.layout import PAGE_TOKENS, lay_out, pool_shapes
from peerd.compute.model.stored_as import forms_of
from peerd.compute.quantized.formats import NONE, PACKED, RUN_VALUES_CPU, RUN_VALUES_GPU
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peerd.compute.checkpoint.checkpoint import Checkpoint

# Not all free memory is ours: the rest of the machine may grow by this share of it.
HEADROOM = 0.15
# A server with many connections grows by some 30 MiB; the rest is memory that a fragmented heap does not return.
PROCESS_BYTES = 96 * 2**20
# A hop holds up to this many copies of a position's activations: kept for the next hop, in a buffer that grows by
# doubling, and one in steps that arrive or results that leave.
_HOST_COPIES = 3
# Copies of a run of weights while it is quantized: bitsandbytes' nf4 for the CPU makes the most.
_PACKING_COPIES = 10
# Of a run of weights that is unpacked: values, scales and zero points by column, and what comes of them.
_UNPACKING_COPIES = 6
_INNER_WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERTS_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")
# If the caller gives no number: what one long conversation takes.
LONG_SESSION_POSITIONS = 8192


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """The memory of one block, and the further memory while it is loaded, in bytes."""

    n_bytes: int
    loading_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory that serving some blocks takes beside the program itself, in bytes.

    blocks: their weights, exactly.
    loading: what loading them takes beside the weights, before there is any KV.
    kv_per_token: a position in all of their KV caches.
    host_per_token: a session's position in the host's memory, whatever the device: activations in transit, and those
        kept for the case that the next hop dies.
    working: a batch's activations, for a session of LONG_SESSION_POSITIONS, or of the model's context if that is less.
    working_per_position: what each further position of the longest session adds: scores, masks and gathered KV.
    positions_per_token: the positions that a session can have for each KV token.
    longest: the positions that a session can have at all; None for no limit.
    process: connections, buffers, and memory that the allocator cannot give back.
    """

    blocks: int
    loading: int
    kv_per_token: int
    host_per_token: int
    working: int
    process: int = PROCESS_BYTES
    working_per_position: int = 0
    positions_per_token: int = 1
    longest: int | None = None

    def working_with(self, kv_tokens: int) -> int:
        """The bytes of a batch's activations if one session may take all of `kv_tokens` positions of KV."""
        positions = kv_tokens * self.positions_per_token
        if self.longest is not None:
            positions = min(positions, self.longest)
        return self.working + self.working_per_position * max(0, positions - LONG_SESSION_POSITIONS)

    def fixed(self, *, on_host: bool) -> int:
        """The bytes taken before any session has KV: of the device's memory, and of the host's if that is the
        device.
        """
        # One page beyond all that rows own, into which padding writes.
        scratch = PAGE_TOKENS * self.kv_per_token
        return self.blocks + scratch + self.working + (self.process if on_host else 0)

    def total(self, kv_tokens: int, *, on_host: bool) -> int:
        """The most bytes of the device's memory that are ever taken, with KV for `kv_tokens` positions all in use."""
        each = self.kv_per_token + (self.host_per_token if on_host else 0)
        serving = self.fixed(on_host=on_host) - self.working + self.working_with(kv_tokens) + kv_tokens * each
        return max(serving, self.blocks + self.loading + (self.process if on_host else 0))

    def kv_tokens_in(self, room: int, *, on_host: bool) -> int:
        """Positions of KV that fit beside everything else into `room` bytes of the device; negative if the blocks do
        not fit.
        """
        if self.total(0, on_host=on_host) > room:
            return -1
        each = self.kv_per_token + (self.host_per_token if on_host else 0)
        most = (room - self.fixed(on_host=on_host)) // each
        # A longer session needs larger batches, so the last of these may not fit.
        return bisect_right(range(most + 1), room, key=lambda tokens: self.total(tokens, on_host=on_host)) - 1


def block_costs(checkpoint: Checkpoint, dtype: torch.dtype, quantize: str = NONE) -> tuple[BlockBytes, ...]:
    """The cost of each of the model's blocks, in order, computing in `dtype` and stored as `quantize` says."""
    decoder = build_on_meta(checkpoint.family.decoder_type(), checkpoint.config, dtype)
    layers: Iterable[torch.nn.Module] = getattr(decoder, checkpoint.family.layers)
    return tuple(_cost(checkpoint, block, layer, dtype, quantize) for block, layer in enumerate(layers))


def block_bytes(checkpoint: Checkpoint, dtype: torch.dtype, quantize: str = NONE) -> int:
    """The bytes of the model's largest block."""
    return max(cost.n_bytes for cost in block_costs(checkpoint, dtype, quantize))


def kv_bytes_per_token(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """The bytes of one position in the KV cache of one block; of the largest, if blocks differ."""
    return max(_token_bytes([kind], dtype) for kind in layer_kinds(checkpoint.config))


def span_budget(
    checkpoint: Checkpoint,
    span: Span | int,
    dtype: torch.dtype,
    quantize: str = NONE,
    *,
    batch_tokens: int,
    on_host: bool = True,
) -> Budget:
    """The memory for serving a span; or that many blocks, each counted as the largest."""
    costs = block_costs(checkpoint, dtype, quantize)
    kinds = layer_kinds(checkpoint.config)
    if isinstance(span, Span):
        own = slice(span.start, span.end)
        kinds = kinds[own]
        blocks, kv = sum(cost.n_bytes for cost in costs[own]), _token_bytes(kinds, dtype)
    else:
        blocks, kv = span * max(cost.n_bytes for cost in costs), span * kv_bytes_per_token(checkpoint, dtype)
    return Budget(
        blocks=blocks,
        loading=max(cost.loading_bytes for cost in costs),
        kv_per_token=kv,
        host_per_token=_HOST_COPIES * checkpoint.hidden_size * dtype.itemsize * _positions_a_token(checkpoint, kinds),
        working=working_bytes(checkpoint, dtype, batch_tokens, quantize, on_host=on_host),
        working_per_position=_bytes_per_position(checkpoint, dtype, batch_tokens, on_host=on_host),
        positions_per_token=_positions_a_token(checkpoint, kinds),
        longest=checkpoint.max_length,
    )


def default_kv_tokens(checkpoint: Checkpoint, dtype: torch.dtype, span: Span | None = None) -> int:
    """The KV tokens of one conversation in these blocks (default: all): its positions, and its running states."""
    kinds = layer_kinds(checkpoint.config)
    own = kinds if span is None else kinds[span.start : span.end]
    return _conversation(checkpoint) + lay_out(own, dtype.itemsize).state_tokens()


def least_kv_tokens(checkpoint: Checkpoint, dtype: torch.dtype, span: Span) -> int:
    """The KV tokens that a session of one position takes in these blocks: a page, and the row's running states."""
    return PAGE_TOKENS + lay_out(layer_kinds(checkpoint.config)[span.start : span.end], dtype.itemsize).state_tokens()


def _conversation(checkpoint: Checkpoint) -> int:
    """The positions of one conversation: the model's context, or 8192 if that is less."""
    return min(checkpoint.max_length or LONG_SESSION_POSITIONS, LONG_SESSION_POSITIONS)


def _token_bytes(kinds: Sequence[LayerKind], dtype: torch.dtype) -> int:
    """The bytes of one position in the KV caches of these blocks; if they have none, of a page's slot."""
    values = sum(kind.values_per_token for kind in kinds)
    return (values or pool_shapes(kinds, lay_out(kinds))[0].values_per_token) * dtype.itemsize


def working_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype, batch_tokens: int, quantize: str = NONE, *, on_host: bool = True
) -> int:
    """The bytes that a batch of `batch_tokens` positions takes while it runs, beside weights and KV.

    An upper bound over the families: a block's activations, one batch's scores against one conversation, and the
    gathered keys and values of that conversation.
    """
    config = checkpoint.config
    heads, width = _heads(config), _head_width(checkpoint)
    inner = max(int(getattr(config, name, None) or 0) for name in _INNER_WIDTHS) or 4 * checkpoint.hidden_size
    copies = max(int(getattr(config, name, None) or 0) for name in _EXPERTS_A_TOKEN) or 1
    values = 8 * checkpoint.hidden_size + 4 * heads * width + 4 * copies * (inner + checkpoint.hidden_size)
    context = _conversation(checkpoint) * _bytes_per_position(checkpoint, dtype, batch_tokens, on_host=on_host)
    states = [kind.state.most_working_values(batch_tokens) for kind in layer_kinds(config) if kind.state is not None]
    dequantized = (
        2 * (RUN_VALUES_CPU if on_host else RUN_VALUES_GPU) * torch.float32.itemsize if quantize != NONE else 0
    )
    mixing = max(states, default=0)
    return (batch_tokens * values + mixing) * torch.float32.itemsize + context + dequantized


def _bytes_per_position(checkpoint: Checkpoint, dtype: torch.dtype, batch_tokens: int, *, on_host: bool) -> int:
    """What each position of a session adds to a batch of that session: scores, masks, and its gathered keys and values.

    Norms, softmax and masks are in fp32, whatever the dtype.
    """
    heads = _heads(checkpoint.config)
    scores = 3 * heads * batch_tokens * torch.float32.itemsize if _keeps_scores(checkpoint.config) else 0
    mask = 2 * batch_tokens * torch.float32.itemsize
    # A GPU repeats them for every query head (`scores.for_every_head`).
    repeated = 0 if on_host else 2 * heads * _head_width(checkpoint) * dtype.itemsize
    return scores + mask + 2 * kv_bytes_per_token(checkpoint, dtype) + repeated


def _head_width(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    return max(int(getattr(config, "head_dim", None) or 0), checkpoint.hidden_size // max(_heads(config), 1))


def _heads(config: PreTrainedConfig) -> int:
    """How many heads attention has; 0 for a model without attention."""
    return int(getattr(config, "num_attention_heads", None) or 0)


def fits(
    checkpoint: Checkpoint,
    room: int,
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    kv_tokens: int = 0,
    quantize: str = NONE,
    on_host: bool = True,
) -> int:
    """How many blocks can be served within `room` bytes, each with KV for `kv_tokens` positions.

    With `kv_tokens` 0, for one conversation. Never more than the model has; 0 if not even one block fits.
    """

    def budget_of(count: int) -> Budget:
        return span_budget(checkpoint, count, dtype, quantize, batch_tokens=batch_tokens, on_host=on_host)

    tokens = kv_tokens or default_kv_tokens(checkpoint, dtype)
    return fitting(budget_of, room, tokens, checkpoint.block_count, on_host=on_host)


def fitting(budget_of: Callable[[int], Budget], room: int, tokens: int, most: int, *, on_host: bool = True) -> int:
    """How many blocks can be served within `room` bytes, at most `most`, each with KV for `tokens` positions.

    budget_of: the memory of a number of blocks.
    """
    one, two = budget_of(1), budget_of(2)
    if one.total(tokens, on_host=on_host) > room:
        return 0
    # A budget grows by the same amount with each block, except for loading, which counts once.
    step = two.blocks - one.blocks + (tokens + PAGE_TOKENS) * (two.kv_per_token - one.kv_per_token)
    count = min(most, 1 + (room - one.total(tokens, on_host=on_host)) // step)
    return int(count)


def fits_on_disk(checkpoint: Checkpoint, count: int) -> int:
    """How many of `count` blocks, wherever they lie, fit into the disk space for downloads; at least 1."""
    if checkpoint.disk_bytes is None:
        return count
    while count > 1:
        starts = range(checkpoint.block_count - count + 1)
        most = max(checkpoint.download_bytes(Span(start, start + count)) for start in starts)
        if most <= checkpoint.disk_bytes:
            break
        count -= 1
    return count


def _cost(checkpoint: Checkpoint, block: int, layer: torch.nn.Module, dtype: torch.dtype, quantize: str) -> BlockBytes:
    found = forms_of(layer, checkpoint, f"{checkpoint.family.layers}.{block}.", quantize)
    stored_size = max(checkpoint.dtype.itemsize, dtype.itemsize)
    # Transformers' processors for GGUF make a second copy, of whole tensors.
    copies = 2 if checkpoint.is_gguf else 1
    # Of weights that their publisher packed, a run of rows is held in fp32 with its scales; their pieces take no more
    # than the parameter that is made of them.
    unpacking = _UNPACKING_COPIES * RUN_VALUES * torch.float32.itemsize if checkpoint.packing else 0
    n_bytes, loading = 0, 0
    for name, tensor in layer.state_dict().items():
        source = tensor.numel() * stored_size * copies
        if name in found:
            target, form = found[name]
            n_bytes += target.n_bytes(form)
            if quantize == PACKED:
                # Rows are read a run at a time: of GGUF from the file, else from pieces of at most a byte a value.
                source = 0 if checkpoint.is_gguf else tensor.numel()
            elif target.stacked and not checkpoint.is_gguf:
                # An expert's pieces, the expert, and the one before it.
                source = 3 * source // target.count
            source += _PACKING_COPIES * RUN_VALUES_CPU * torch.float32.itemsize
        else:
            n_bytes += tensor.nbytes
        loading = max(loading, source + unpacking)
    return BlockBytes(n_bytes, loading)


def _positions_a_token(checkpoint: Checkpoint, kinds: Sequence[LayerKind]) -> int:
    """How many positions a session can have for each KV token: more than one if blocks keep only a window."""
    longest = checkpoint.max_length or LONG_SESSION_POSITIONS
    return -(-longest // lay_out(kinds).tokens_wanted(max_length=longest))


def _keeps_scores(config: PreTrainedConfig) -> bool:
    """Whether attention must hold a batch's scores in memory, because fused kernels cannot compute it."""
    if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss":
        return True
    family = FAMILIES.get(config.model_type)
    return family is not None and not family.attention_interface

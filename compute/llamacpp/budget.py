"""The memory that llama.cpp takes for a span: weights as in the file, KV in fp16, and the buffers of a batch."""

from __future__ import annotations

import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.engine.capacity import Budget, block_costs, working_bytes
from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.kv.layout import BATCH_TOKENS
from peerd.compute.llamacpp.span_file import block_tensors
from peerd.compute.llamacpp.supported import file_of
from peerd.compute.model.stored_as import has_grids
from peerd.compute.quantized.formats import NONE, PACKED
from peerd.protocol.span import Span

# Copies of a position's activations in the host's memory, as for other engines (`capacity.py`).
_HOST_COPIES = 3
# For each position of a batch and each of the cache, llama.cpp holds a mask in fp32 and in fp16.
_MASK_BYTES = 4 + 2


def llama_budget(checkpoint: Checkpoint, span: Span | int, batch_tokens: int = BATCH_TOKENS) -> Budget:
    """The memory for serving a span; or that many blocks, each counted as the largest."""
    file, kinds = file_of(checkpoint), layer_kinds(checkpoint.config)
    sizes = [sum(tensor.n_bytes for tensor in block_tensors(file, block)) for block in range(checkpoint.block_count)]
    each_kv = [kind.values_per_token * torch.float16.itemsize for kind in kinds]
    if isinstance(span, Span):
        blocks, kv = sum(sizes[span.start : span.end]), sum(each_kv[span.start : span.end])
    else:
        blocks, kv = span * max(sizes), span * max(each_kv)
    return Budget(
        blocks=blocks,
        loading=_comparing_bytes(checkpoint),
        kv_per_token=kv,
        host_per_token=_HOST_COPIES * checkpoint.hidden_size * torch.float32.itemsize,
        working=working_bytes(checkpoint, torch.float32, batch_tokens) + batch_tokens * kv,
        working_per_position=batch_tokens * _MASK_BYTES,
        longest=None,
    )


def _comparing_bytes(checkpoint: Checkpoint) -> int:
    """The memory for one block in torch, with which the span is compared when it is loaded."""
    quantize = PACKED if has_grids(checkpoint) else NONE
    return max(cost.n_bytes + cost.loading_bytes for cost in block_costs(checkpoint, torch.float32, quantize))

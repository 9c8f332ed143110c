"""Loads a span into llama.cpp, checks it, and makes its engine."""

from __future__ import annotations

import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.kv.layout import BATCH_TOKENS
from peerd.compute.llamacpp.engine import LlamaEngine, cells_for
from peerd.compute.llamacpp.library import load_library
from peerd.compute.llamacpp.self_test import check_llama_span
from peerd.compute.llamacpp.span_model import LlamaSpan
from peerd.compute.llamacpp.supported import file_of, why_not
from peerd.protocol.span import Span


def load_llama_engine(
    checkpoint: Checkpoint, span: Span, *, kv_tokens: int, batch_tokens: int = BATCH_TOKENS
) -> LlamaEngine:
    """Read a span's blocks and make an engine of them, with as many threads as torch has.

    Raises UnusablePackageError, CheckpointError, UnsupportedModelError, OSError, MemoryError, and IndexError for a span
    that the model does not have.
    """
    if span.end > checkpoint.block_count:
        raise IndexError(f"{checkpoint.name} has {checkpoint.block_count} blocks: there is no span {span}")
    if reason := why_not(checkpoint):
        raise UnsupportedModelError(f"llama.cpp cannot serve {checkpoint.name}: it {reason}")
    model = LlamaSpan(
        load_library(),
        file_of(checkpoint),
        span,
        checkpoint.hidden_size,
        cells=cells_for(kv_tokens, batch_tokens),
        batch=batch_tokens,
        threads=torch.get_num_threads(),
    )
    check_llama_span(model, checkpoint)
    model.give_back_cache()
    return LlamaEngine(model, kv_tokens=kv_tokens)

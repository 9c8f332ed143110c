"""Compares a span that llama.cpp loaded with the model's own arithmetic in torch, before it is announced.

llama.cpp has its own code for each architecture, and a release of it, or a file that it reads in another way, may
change what a block computes. So some positions run through the span; what its first and its last block made of their
input must be what the same blocks make of it in torch. Then the positions run again in pieces, over the cache, beside a
second sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.llamacpp.library import PACKAGE, package_version
from peerd.compute.llamacpp.span_model import Array, LlamaSpan
from peerd.compute.model.span_model import load_span
from peerd.compute.model.stored_as import has_grids
from peerd.compute.quantized.formats import NONE, PACKED
from peerd.protocol.span import Span

# A prompt, two tokens, and a prompt that follows them.
_PIECES = (3, 1, 1, 3)
_LENGTH = sum(_PIECES)
# As small as embeddings are, so that most of the output comes from the block.
_SCALE = 0.05
# How far the two may differ, relative to what a block adds: llama.cpp rounds activations to 8 bits, and packed weights
# are multiplied in bfloat16. Tiny models of all architectures differ by at most 0.03; a block that lacks its rotary
# embedding by 0.5 and more.
_BOUND = 0.15
# A whole span adds up the rounding of its blocks.
_SPAN_BOUND = 0.3


def check_llama_span(model: LlamaSpan, checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError, with a message of one line, if llama.cpp computes these blocks wrongly.

    Call it while no sequence has positions; it leaves none. Blocks the thread for milliseconds to seconds.
    """
    hidden = torch.randn(_LENGTH, model.width, generator=torch.Generator().manual_seed(0)) * _SCALE
    try:
        outputs = model.trace(hidden.numpy(), 0)
        for block in sorted({model.span.start, model.span.end - 1}):
            index = block - model.span.start
            given = torch.from_numpy(outputs[index - 1]) if index else hidden
            _compare(f"block {block}", outputs[index], _expected(checkpoint, block, given), given, _BOUND)
        model.cut(0)
        for output in _in_pieces(model, hidden.numpy()):
            _compare(f"blocks {model.span} in pieces", output, torch.from_numpy(outputs[-1]), hidden, _SPAN_BOUND)
    except (_Wrong, RuntimeError) as wrong:
        raise UnsupportedModelError(
            f"{checkpoint.name} cannot be served with llama.cpp ({PACKAGE} {package_version()}): {wrong}"
        ) from wrong
    finally:
        model.cut(0)
        model.cut(1)


class _Wrong(Exception):
    """What differs; the message is for the operator."""


def _expected(checkpoint: Checkpoint, block: int, hidden: torch.Tensor) -> torch.Tensor:
    quantize = PACKED if has_grids(checkpoint) else NONE
    model = load_span(checkpoint, Span(block, block + 1), quantize=quantize)
    with torch.inference_mode():
        return model.forward_no_cache(hidden[None])[0]


def _in_pieces(model: LlamaSpan, hidden: Array) -> Sequence[Array]:
    """The outputs of two sequences that run the same positions, one piece after the other."""
    parts: list[Array] = []
    start = 0
    for count in _PIECES:
        positions = [*range(start, start + count)] * 2
        piece = hidden[start : start + count]
        parts.append(model.run(np.concatenate([piece, piece]), positions, [0] * count + [1] * count))
        start += count
    return [np.concatenate([part[row * len(part) // 2 :][: len(part) // 2] for part in parts]) for row in (0, 1)]


def _compare(what: str, got: Array, expected: torch.Tensor, given: torch.Tensor, bound: float) -> None:
    added = (expected - given).norm(dim=-1).mean()
    # The median of the positions: where two experts suit a position almost equally well, rounding may choose.
    error = float(((torch.from_numpy(got) - expected).norm(dim=-1) / added).median())
    # Not a number is no number below the bound.
    if not error < bound:
        raise _Wrong(f"{what} differs by {error:.2g} from torch's, relative to what it adds")

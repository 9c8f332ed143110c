"""How much worse the real SmolLM2 predicts with quantized weights, teacher-forced.

There are bounds instead of equality, because rounding weights changes every logit. They are half as much again as the
measured values, so that a format that rounds more than it should is noticed. Small models suffer most, and this one's
weights were published in 4 bits of another kind. `make bench-quantization` has perplexities.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.checkpoint.tokenizer import load_tokenizer
from peerd.compute.model.head import Head, load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span

pytestmark = pytest.mark.model

TEXT = """The light became electric in 1931, and automatic in 1968. The last keeper was a quiet man who had come to the
harbour by way of Liverpool and Lagos and who played the cello in the evenings. When the board told him that the light
would from now on look after itself, he asked whether he might stay in the house. They let him, for a small rent, and so
he went on doing more or less what he had always done. He painted the door and watered the flowers."""

# Measured over this text: 0.0026 and 0.27 nats a token; 93 % and 64 % of the likeliest tokens.
MOST_DIVERGENCE = {"int8": 0.004, "nf4": 0.4}
LEAST_AGREEMENT = {"int8": 0.88, "nf4": 0.55}


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    with open_checkpoint(demo_model_path()) as opened:
        yield opened


@pytest.fixture(scope="module")
def head(checkpoint: Checkpoint) -> Head:
    return load_head(checkpoint)


def predictions(checkpoint: Checkpoint, head: Head, quantize: str) -> torch.Tensor:
    """The logarithms of every token's probability at every position."""
    span = load_span(checkpoint, Span(0, checkpoint.block_count), quantize=quantize)
    tokens = torch.tensor(load_tokenizer(checkpoint)(TEXT)["input_ids"])
    with torch.inference_mode():
        return head.logits(span.forward_no_cache(head.embed(tokens)[None])[0]).log_softmax(-1)


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint, head: Head) -> torch.Tensor:
    return predictions(checkpoint, head, "none")


@pytest.mark.parametrize("quantize", sorted(MOST_DIVERGENCE))
def test_quantized_weights_predict_almost_the_same(
    checkpoint: Checkpoint, head: Head, plain: torch.Tensor, quantize: str
) -> None:
    found = predictions(checkpoint, head, quantize)
    divergence = float((plain.exp() * (plain - found)).sum(-1).mean())
    agreement = float((plain.argmax(-1) == found.argmax(-1)).float().mean())
    print(f"{quantize}: {divergence:.4f} nats a token, {agreement:.0%} of the likeliest tokens")
    assert divergence <= MOST_DIVERGENCE[quantize]
    assert agreement >= LEAST_AGREEMENT[quantize]

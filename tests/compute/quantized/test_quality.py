"""How much worse the real SmolLM2 predicts with quantized weights, teacher-forced.

There are bounds instead of equality, because rounding changes every logit. They are half as much again as the measured
values, so that a format that rounds more than it should is noticed. Small models suffer most. This one's weights were
published in 4 bits, which packed weights keep; int8 and nf4 round them once more. `make bench-quantization` has
perplexities.
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
from peerd.compute.quantized.group_matrix import Choice, GroupMatrix
from peerd.compute.quantized.modules import matrices_in
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


def predictions(checkpoint: Checkpoint, head: Head, quantize: str, choice: Choice | None = None) -> torch.Tensor:
    """The logarithms of every token's probability at every position. `choice`: how packed weights are multiplied."""
    span = load_span(checkpoint, Span(0, checkpoint.block_count), quantize=quantize)
    for matrix in matrices_in(span):
        if choice is not None and isinstance(matrix, GroupMatrix):
            matrix.choice = choice
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


# Measured over this text: 0.0003, 0.0001 and 0.0003 nats a token; 97, 100 and 99 % of the likeliest tokens.
@pytest.mark.parametrize(
    ("choice", "most"),
    [(Choice(1 << 20), 0.0005), (Choice(0), 0.0002), (Choice(0, in_bf16=True), 0.0005)],
    ids=["kernel", "slices", "slices in bfloat16"],
)
def test_packed_weights_predict_what_the_file_predicts(
    checkpoint: Checkpoint, head: Head, plain: torch.Tensor, choice: Choice, most: float
) -> None:
    found = predictions(checkpoint, head, "packed", choice)
    divergence = float((plain.exp() * (plain - found)).sum(-1).mean())
    agreement = float((plain.argmax(-1) == found.argmax(-1)).float().mean())
    print(f"{choice}: {divergence:.5f} nats a token, {agreement:.1%} of the likeliest tokens")
    assert divergence <= most
    assert agreement >= 0.95

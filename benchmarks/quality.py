"""Measures how well a chain of spans predicts a fixed text: its perplexity, and its distance from another chain's
predictions.

`fixed_text.txt` was written for this benchmark, so no model was trained on it. Every token is predicted from all tokens
before it (teacher-forced), in one pass without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.tokenizer import load_tokenizer
from peerd.compute.model.head import Head
from peerd.compute.model.span_model import SpanModel
from peerd.protocol.encoding.tensors import decode_tensor, encode_tensor

TEXT = Path(__file__).with_name("fixed_text.txt")


def text_tokens(checkpoint: Checkpoint) -> torch.Tensor:
    """The text as token ids, `[n]`."""
    return torch.tensor(load_tokenizer(checkpoint)(TEXT.read_text())["input_ids"])


def log_probabilities(
    head: Head,
    hops: Sequence[SpanModel],
    tokens: torch.Tensor,
    *,
    codec: str = "exact",
    wire_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The log probability of every token at every position, `[n, vocabulary]`.

    With `wire_dtype`, activations travel in this dtype and in `codec`: from the client to the first hop, from hop to
    hop, and back. The head and the hops compute in fp32.
    """
    with torch.inference_mode():
        hidden = head.embed(tokens).float()
        hidden = over_the_wire(hidden, codec, wire_dtype)
        for hop in hops:
            hidden = over_the_wire(hop.forward_no_cache(hidden[None].to(hop.dtype))[0].float(), codec, wire_dtype)
        return head.logits(hidden).float().log_softmax(-1)


def over_the_wire(hidden: torch.Tensor, codec: str, dtype: torch.dtype | None) -> torch.Tensor:
    """Encode and decode, as the receiver would see it."""
    if dtype is None:
        return hidden
    header, body = encode_tensor(hidden.clone(), codec=codec, dtype=dtype)
    return decode_tensor(header, b"".join(body)).float()


def perplexity(predictions: torch.Tensor, tokens: torch.Tensor) -> float:
    """The perplexity of the tokens after the first."""
    return float(F.nll_loss(predictions[:-1], tokens[1:]).exp())


def divergence(wanted: torch.Tensor, predictions: torch.Tensor) -> float:
    """KL divergence of the predictions from the wanted ones, in nats a token."""
    return float(F.kl_div(predictions, wanted, log_target=True, reduction="batchmean"))


def agreement(wanted: torch.Tensor, predictions: torch.Tensor) -> float:
    """The share of positions at which both have the same most likely token."""
    return float((wanted.argmax(-1) == predictions.argmax(-1)).float().mean())

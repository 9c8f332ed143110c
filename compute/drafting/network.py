"""The network that guesses a model's next tokens from what its decoder gave out: one layer of attention and an MLP.

A model's hidden state at position t says much about the tokens after it, but not which token was drawn at t + 1. So
each input joins the two: the decoder's output at t and the embedding of the token at t + 1. The output is what the
decoder should give out at t + 1, from which the model's own LM head guesses the token at t + 2. To guess further, the
network reads its own output in place of the decoder's (EAGLE, Li et al., arXiv 2401.15077).

Only the commonest tokens are guessed (EAGLE-3, arXiv 2503.01840): a product with the whole vocabulary would take most
of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

#: The base of the rotary embeddings, as in Llama.
_ROPE_BASE: Final = 10000.0
_EPSILON: Final = 1e-6


@dataclass(frozen=True, slots=True)
class DraftShape:
    """The sizes of a network.

    width: of the model's hidden states. inner: of the MLP. heads: of the attention. tokens: how many tokens of the
    model's `vocab_size` it may guess.
    """

    width: int
    inner: int
    heads: int
    tokens: int
    vocab_size: int

    @classmethod
    def of_model(cls, width: int, vocab_size: int, tokens: int) -> DraftShape:
        """The sizes for a model: a layer as wide as the model's own, with heads of 64 where that divides the width."""
        head = next(size for size in (64, 80, 96, 128, 32, 16, 8, 4, 2) if width % size == 0)
        # Llama's proportion: three matrices of this width cost as much as two of four times the width.
        return cls(width, -(-8 * width // 3), width // head, min(tokens, vocab_size), vocab_size)


@dataclass(frozen=True, slots=True)
class Keys:
    """What attention reads of positions: keys and values, `[texts, heads, positions, head width]`."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def and_then(self, other: Keys) -> Keys:
        """These positions and those of `other` after them."""
        return Keys(torch.cat((self.keys, other.keys), 2), torch.cat((self.values, other.values), 2))

    def until(self, length: int) -> Keys:
        """The first positions only."""
        return Keys(self.keys[:, :, :length], self.values[:, :, :length])


class DraftNetwork(nn.Module):
    """Hidden states and the tokens after them in, the hidden states one position later out.

    `tokens`, int64, are the ids of the tokens that it may guess, in the order of its logits.
    """

    tokens: torch.Tensor

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.norm_hidden = nn.RMSNorm(width, eps=_EPSILON)
        self.norm_embedded = nn.RMSNorm(width, eps=_EPSILON)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.norm_attention = nn.RMSNorm(width, eps=_EPSILON)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.RMSNorm(width, eps=_EPSILON)
        self.gate_up = nn.Linear(width, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, width, bias=False)
        self.norm_out = nn.RMSNorm(width, eps=_EPSILON)
        self.register_buffer("tokens", torch.zeros(shape.tokens, dtype=torch.long))

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor, past: Keys | None) -> tuple[torch.Tensor, Keys]:
        """The decoder's outputs one position later, `[texts, n, width]`, and what attention may read of all positions.

        hidden: the decoder's outputs, `[texts, n, width]`. embedded: of the tokens after them. past: what this gave for
        the positions before.
        """
        joined = self.joined(hidden, embedded)
        queries, new = self.attention_inputs(joined, 0 if past is None else past.length)
        seen = new if past is None else past.and_then(new)
        n = hidden.shape[1]
        mask = None
        if 1 < n < seen.length:
            mask = torch.ones(n, seen.length, dtype=torch.bool, device=hidden.device).tril(seen.length - n)
        read = scaled_dot_product_attention(queries, seen.keys, seen.values, mask, is_causal=mask is None and n > 1)
        return self.finished(joined, read), seen

    def joined(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Hidden states and embeddings as the layer's input, `[texts, n, width]`."""
        both = torch.cat((self.norm_hidden(hidden), self.norm_embedded(embedded)), -1)
        joined: torch.Tensor = self.join(both)
        return joined

    def attention_inputs(self, joined: torch.Tensor, start: int) -> tuple[torch.Tensor, Keys]:
        """Queries `[texts, heads, n, head width]`, and keys and values, for positions from `start` on."""
        texts, n, width = joined.shape
        heads = self.shape.heads
        parts = self.queries_keys_values(self.norm_attention(joined))
        queries, keys, values = parts.view(texts, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        turns = _turns(start, n, width // heads, joined.device)
        return _turned(queries, *turns), Keys(_turned(keys, *turns), values)

    def finished(self, joined: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The layer's output for what attention has read, `[texts, heads, n, head width]`."""
        hidden = joined + self.attended(read.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_mlp(hidden)).chunk(2, -1)
        out: torch.Tensor = self.norm_out(hidden + self.down(silu(gate) * up))
        return out


def _turns(start: int, count: int, head: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding, `[count, head / 2]` each."""
    speeds = torch.exp(torch.arange(0, head, 2, device=device) * (-math.log(_ROPE_BASE) / head))
    angles = torch.arange(start, start + count, device=device)[:, None] * speeds
    return angles.cos(), angles.sin()


def _turned(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, two = vectors.float().chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1).to(vectors.dtype)

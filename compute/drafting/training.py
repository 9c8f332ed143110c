"""Trains a draft head on hidden states of the model for which it will guess.

The target after each position is the model's own distribution of the next token, which its LM head makes of the next
hidden state; so it does not matter whether the model wrote the text. The network also learns to read its own outputs:
each batch is run several times, each time one guess further, and attention then reads what it would read in use: the
model's hidden states up to the last token that is certain, and the network's outputs after it (EAGLE-3's training-time
test, arXiv 2503.01840).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention, smooth_l1_loss

from peerd.compute.drafting.network import DraftNetwork, DraftShape, Keys
from peerd.compute.model.head import Head

# How many guesses in a row are trained for, and how much each weighs against the one before it.
_PLACES = 2
_NEXT_WEIGHT = 0.8
# The weight of the distance between predicted and true hidden states. It keeps outputs what the network can read again.
_DISTANCE_WEIGHT = 0.2
_DECAY = 0.01
_CLIP = 1.0
_WARM_UP = 0.04
_LOWEST_RATE = 0.05


@dataclass(frozen=True, slots=True)
class Piece:
    """A text's tokens, int64 `[n]`, and what the decoder gave out for them, `[n, width]`, in half precision."""

    tokens: torch.Tensor
    hidden: torch.Tensor

    @property
    def length(self) -> int:
        return len(self.tokens)

    def part(self, start: int, length: int) -> Piece:
        """So many tokens from `start` on."""
        return Piece(self.tokens[start : start + length], self.hidden[start : start + length])


def new_network(head: Head, pieces: Iterable[Piece], tokens: int) -> DraftNetwork:
    """An untrained network for a model, which may guess the `tokens` commonest tokens of these pieces."""
    counts: Counter[int] = Counter()
    for piece in pieces:
        counts.update(piece.tokens.tolist())
    # What the texts do not have is filled up with the lowest ids: most tokenizers number common tokens first.
    counts.update({token: 0 for token in range(min(tokens, head.vocab_size))})
    network = DraftNetwork(DraftShape.of_model(head.hidden_size, head.vocab_size, tokens))
    network.tokens.copy_(torch.tensor([token for token, _ in counts.most_common(network.shape.tokens)]))
    return network


class HeadTrainer:
    """Trains one network. Blocks the thread for each step."""

    def __init__(self, network: DraftNetwork, head: Head, *, rate: float, device: str = "cpu") -> None:
        """rate: the highest learning rate."""
        self.network = network.to(device).train()
        self._head = head
        self._device = torch.device(device)
        self._rate = rate
        weight, bias = head.output_rows(network.tokens)
        self._weight = weight.to(self._device)
        self._bias = None if bias is None else bias.to(self._device)
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=_DECAY)

    def step(self, pieces: Sequence[Piece], progress: float) -> float:
        """Learn from these pieces; the loss. progress: the share of the training that is behind us, from 0 to 1."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * _rate_at(progress)
        with torch.enable_grad():
            loss = self._loss(_Batch.of(pieces, self._head, self._device))
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP)
        self._optimizer.step()
        return float(loss.detach())

    def _loss(self, batch: _Batch) -> torch.Tensor:
        with torch.no_grad():
            wanted = linear(batch.after, self._weight, self._bias).softmax(-1)
            scale = batch.after.abs().mean()
        total = torch.zeros((), device=self._device)
        for place, out in enumerate(_unrolled(self.network, batch, _PLACES)):
            valid = batch.valid(place)
            guessed = linear(out, self._weight, self._bias).log_softmax(-1)
            surprise = -(wanted * guessed).sum(-1)
            distance = smooth_l1_loss(out / scale, batch.after / scale, reduction="none").mean(-1)
            mean = ((surprise + _DISTANCE_WEIGHT * distance) * valid).sum() / valid.sum().clamp(min=1)
            total = total + _NEXT_WEIGHT**place * mean
        return total

    @torch.inference_mode()
    def accepted(self, pieces: Sequence[Piece], places: int = 4) -> tuple[float, ...]:
        """For each place of a draft, the share of guesses that are the model's own most likely token, where those
        before them were.
        """
        right, seen = [0] * places, [0] * places
        for piece in pieces:
            batch = _Batch.of([piece], self._head, self._device)
            best = self._head.most_likely(piece.hidden.float())
            # Whether the text goes on as the model would; and whether all guesses before a position are right.
            follows, rightly = (best == piece.tokens.roll(-1))[:-1], torch.ones(piece.length - 1, dtype=torch.bool)
            for place, out in enumerate(_unrolled(self.network, batch, places)):
                guessed = self.network.tokens[linear(out[0], self._weight, self._bias).argmax(-1)].cpu()
                if place:
                    rightly = (rightly & follows.roll(-1)).roll(1)
                    rightly[0] = False
                seen[place] += int(rightly.sum())
                rightly = rightly & (guessed == best[1:])
                right[place] += int(rightly.sum())
        return tuple(hits / max(1, tried) for hits, tried in zip(right, seen, strict=True))


def batches(pieces: Sequence[Piece], rows: int, length: int, rng: random.Random) -> Iterator[list[Piece]]:
    """One pass over all pieces in a random order, cut to parts of at most `length` tokens at random places."""
    parts = [part for piece in pieces for part in _cut(piece, length, rng)]
    rng.shuffle(parts)
    # Parts of a similar length together, so that little is padding.
    parts.sort(key=lambda part: part.length // 32)
    grouped = [parts[at : at + rows] for at in range(0, len(parts), rows)]
    rng.shuffle(grouped)
    yield from grouped


def _cut(piece: Piece, length: int, rng: random.Random) -> Iterator[Piece]:
    start = rng.randrange(length) - length if piece.length > length else 0
    while start < piece.length:
        part = piece.part(max(start, 0), length + min(start, 0))
        if part.length > _PLACES:
            yield part
        start += length


def _rate_at(progress: float) -> float:
    """A short rise and a cosine's fall, as a share of the highest rate."""
    if progress < _WARM_UP:
        return max(progress, 0.1 * _WARM_UP) / _WARM_UP
    fall = (min(progress, 1.0) - _WARM_UP) / (1 - _WARM_UP)
    return _LOWEST_RATE + (1 - _LOWEST_RATE) * (1 + math.cos(math.pi * fall)) / 2


@dataclass(frozen=True, slots=True)
class _Batch:
    """Texts of n + 1 tokens at most: hidden states, embeddings of the tokens after them, and the hidden states after
    those, `[texts, n, width]` each.
    """

    hidden: torch.Tensor
    embedded: torch.Tensor
    after: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, pieces: Sequence[Piece], head: Head, device: torch.device) -> _Batch:
        longest = max(piece.length for piece in pieces)
        hidden = torch.stack([pad(piece.hidden.float(), (0, 0, 0, longest - piece.length)) for piece in pieces])
        tokens = torch.stack([pad(piece.tokens, (0, longest - piece.length)) for piece in pieces])
        embedded = head.embed(tokens.flatten(), torch.arange(longest).repeat(len(pieces))).float()
        embedded = embedded.view(len(pieces), longest, -1).to(device)
        hidden = hidden.to(device)
        lengths = torch.tensor([piece.length - 1 for piece in pieces], device=device)
        return cls(hidden[:, :-1], embedded[:, 1:], hidden[:, 1:], lengths)

    def valid(self, place: int) -> torch.Tensor:
        """1.0 where there is something to predict for this place of a draft, `[texts, n]`."""
        positions = torch.arange(self.hidden.shape[1], device=self.hidden.device)
        return ((positions >= place) & (positions < self.lengths[:, None])).float()


def _unrolled(network: DraftNetwork, batch: _Batch, places: int) -> Iterator[torch.Tensor]:
    """The predictions for each place of a draft, `[texts, n, width]`.

    At index t of place p, the last p inputs are the network's own outputs, and attention reads the inputs of place 0
    before them.
    """
    hidden, steps = batch.hidden, list[Keys]()
    for _ in range(places):
        joined = network.joined(hidden, batch.embedded)
        queries, keys = network.attention_inputs(joined, 0)
        steps.append(keys)
        out = network.finished(joined, _read(queries, steps))
        yield out
        hidden = _later(out, 1, hidden)


def _read(queries: torch.Tensor, steps: Sequence[Keys]) -> torch.Tensor:
    """Attention of the last of these steps, `[texts, heads, n, head width]`."""
    first, count = steps[0], len(steps)
    if count == 1:
        return scaled_dot_product_attention(queries, first.keys, first.values, is_causal=True)
    n, scale = queries.shape[2], queries.shape[3] ** -0.5
    certain = torch.ones(n, n, dtype=torch.bool, device=queries.device).tril(1 - count)
    scores = (queries @ first.keys.transpose(-1, -2)).masked_fill(~certain, -math.inf)
    # Of each later step, only the position on the way to this one: as many positions back as steps.
    drafted = [
        Keys(_later(step.keys, count - at), _later(step.values, count - at)) for at, step in enumerate(steps[1:], 2)
    ]
    own = [(queries * step.keys).sum(-1, keepdim=True) for step in drafted]
    shares = (torch.cat((scores, *own), -1) * scale).softmax(-1)
    read: torch.Tensor = shares[..., :n] @ first.values
    for at, step in enumerate(drafted):
        read = read + shares[..., n + at : n + at + 1] * step.values
    return read


def _later(values: torch.Tensor, count: int, first: torch.Tensor | None = None) -> torch.Tensor:
    """Move values so many positions towards the end of the last axis but one. What `first` has comes first."""
    if not count:
        return values
    kept = values if first is None else first
    return torch.cat((kept[..., :count, :], values[..., :-count, :]), -2)

"""Turns texts into vectors: the mean over a text's positions of the model's last hidden states, of length 1.

"Last" is after the final norm, as in Transformers' `last_hidden_state`. Most models that a swarm serves were trained to
write, not to compare texts, so these vectors are worse at that than those of a model made for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from peerd.client.finding.finder import Patience

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel

# Positions whose hidden states are here at the same time: 256 MB of them at a width of 4096.
_POSITIONS_AT_ONCE = 16384
# As for answers: a program that asks is told within ten seconds that there is no room.
_PATIENCE = Patience(first_busy_s=6.0)


async def mean_pooled(model: SwarmModel, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """A vector for each text of token ids, float32 `[texts, width]`.

    Raises NoChain, Overloaded, ContextTooLong, InvalidRequest.
    """
    parts = []
    for group in _groups(texts):
        lengths = [len(text) for text in group]
        hidden = await model.in_thread(_embedded, model, group)
        with await model.forward(hidden, rows=lengths, keep=False, patience=_PATIENCE) as done:
            last = await model.last_hidden(done.output)
        parts.append(await model.in_thread(_means, last, lengths))
    return torch.cat(parts)


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Texts that go through the model together."""
    group: list[Sequence[int]] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > _POSITIONS_AT_ONCE:
            yield group
            group = []
        group.append(text)
    yield group


def _embedded(model: SwarmModel, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.cat([model.embed(text) for text in texts])


def _means(hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    means = torch.stack([part.mean(0) for part in torch.split(hidden, list(lengths))])
    return torch.nn.functional.normalize(means, dim=-1)

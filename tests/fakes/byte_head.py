"""A head over 257 tokens for swarms in memory: it computes where it is called, and any token may be the likeliest."""

from __future__ import annotations

from typing import Any

import torch
import trio

WIDTH = 8
END = 256
VOCABULARY = END + 1


class RandomHead:
    """Embeds a token as its number, in all columns; a table of random numbers gives the logits.

    calls: how often logits were computed.
    """

    vocab_size = VOCABULARY

    def __init__(self) -> None:
        self.calls = 0
        self._table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))

    async def run(self) -> None:
        await trio.sleep_forever()

    def embed(self, token_ids: Any, start: int = 0) -> torch.Tensor:
        return torch.tensor(token_ids).float()[:, None].expand(-1, WIDTH).clone()

    async def logits(self, hidden: torch.Tensor, most: int | None = None) -> torch.Tensor:
        await trio.lowlevel.checkpoint()
        self.calls += 1
        return self._table[hidden[:, 0].long()]

    async def in_thread(self, function: Any, *arguments: Any, limiter: object = None) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

"""Runs a model's head for all sessions of a client, in batches of all requests that have come in.

The LM head of a small model has a tenth of the model's weights; reading them once for eight sessions costs as much as
for one. The head runs in a worker thread, so that a large vocabulary does not block the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import trio

from peerd.compute.errors import CheckpointError
from peerd.compute.model.head import Head
from peerd.protocol.errors import InvalidRequest

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Request:
    hidden: torch.Tensor
    most: int | None
    done: trio.Event = field(default_factory=trio.Event)
    logits: torch.Tensor | None = None
    error: CheckpointError | None = None


class HeadTask:
    """Computes embeddings and logits of one model. `run` owns the thread.

    load_output: reads the part that computes logits when it is first needed, if `head` lacks it. It runs in the thread,
        and may raise CheckpointError.
    positions_at_once: of how many positions logits may be computed at the same time, if no request has more; None: any.
    """

    def __init__(
        self, head: Head, *, load_output: Callable[[], Head] | None = None, positions_at_once: int | None = None
    ) -> None:
        self._head = head
        self._load_output = load_output
        self._output = head if load_output is None else None
        self._positions_at_once = positions_at_once
        self._requests: list[_Request] = []
        self._work = trio.Event()
        self._limiter = trio.CapacityLimiter(1)

    @property
    def head(self) -> Head:
        """The head itself, which several threads may use at once."""
        return self._head

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._head.vocab_size

    def embed(self, token_ids: Sequence[int], start: int = 0) -> torch.Tensor:
        """Turn token ids into `[n, width]`, on the CPU, for positions from `start` on.

        Raises InvalidRequest for ids outside the vocabulary, and for positions that the model has no embedding for.
        """
        for token_id in token_ids:
            if not 0 <= token_id < self._head.vocab_size:
                raise InvalidRequest(f"token {token_id} is not one of the model's {self._head.vocab_size}")
        end, most = start + len(token_ids), self._head.max_positions
        if start < 0 or (most is not None and end > most):
            raise InvalidRequest(f"positions {start} to {end - 1} wanted; the model embeds {most}")
        positions = torch.arange(start, end)
        return self._head.embed(torch.tensor(token_ids, dtype=torch.long), positions)

    async def logits(self, hidden: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Turn `[n, width]` into float32 logits, `[n, vocabulary]`. `most`: see `Head.logits`.

        Raises CheckpointError if they need a part of the head that cannot be read.
        """
        request = _Request(hidden, most)
        self._requests.append(request)
        self._work.set()
        await request.done.wait()
        if request.error is not None:
            raise request.error
        assert request.logits is not None
        return request.logits

    async def last_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn the last block's output, `[n, width]`, into the decoder's; see `Head.last_hidden`."""
        return await trio.to_thread.run_sync(lambda: self._output_head().last_hidden(hidden), limiter=self._limiter)

    async def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The mean loss of predicting `targets`, `[n]`, from `[n, width]`, and its gradient; see `Head.loss`."""
        return await trio.to_thread.run_sync(lambda: self._output_head().loss(hidden, targets), limiter=self._limiter)

    def _output_head(self) -> Head:
        """What computes logits. Blocks the first time."""
        if self._output is None:
            assert self._load_output is not None
            self._output = self._load_output()
        return self._output

    async def in_thread(
        self, function: Callable[..., T], *arguments: object, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        """Call a function that computes for long in a worker thread. If the call is cancelled, nobody waits for it."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=limiter, abandon_on_cancel=True)

    async def run(self) -> None:
        """Answer requests until cancelled."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            requests, self._requests = self._requests, []
            for is_best in (True, False):
                for batch in self._batches([each for each in requests if (each.most is not None) is is_best]):
                    await self._compute(batch)

    def _batches(self, requests: Sequence[_Request]) -> Iterator[list[_Request]]:
        """The requests in their order, as many at a time as may be computed together."""
        most = self._positions_at_once
        batch: list[_Request] = []
        for request in requests:
            if most is not None and batch and sum(len(each.hidden) for each in (*batch, request)) > most:
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    async def _compute(self, requests: Sequence[_Request]) -> None:
        """Compute requests that all want either the best logits or all."""
        hidden = torch.cat([request.hidden for request in requests])
        most = max((request.most for request in requests if request.most is not None), default=None)
        try:
            logits = await trio.to_thread.run_sync(
                lambda: self._output_head().logits(hidden, most), limiter=self._limiter
            )
        except CheckpointError as error:
            for request in requests:
                request.error = error
                request.done.set()
            return
        for request, part in zip(requests, torch.split(logits, [len(r.hidden) for r in requests]), strict=True):
            request.logits = part
            request.done.set()

"""Trains whole blocks of a model on the peers that allow it; the loss and the texts stay with the client.

Hidden states go through the chain as in every training pass. Where blocks are trained, they go to the peer with the
copy. The gradient comes back as far as the first of those blocks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from peerd.client.training.span_lane import SpanForward, SpanLane
from peerd.protocol.errors import ContextTooLong, InvalidRequest, PeerdError
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.span_training import SpanBegin
from peerd.protocol.span import Span
from peerd.trio_tools import at_once

if TYPE_CHECKING:
    from peerd.client.training.training_pass import Pass

T = TypeVar("T")


class Facts(Protocol):
    """The facts about a model that training needs."""

    @property
    def digest(self) -> bytes: ...

    @property
    def block_count(self) -> int: ...

    @property
    def max_length(self) -> int: ...


class Model(Protocol):
    """The model whose blocks are trained: a `SwarmModel`, which says what its methods do."""

    @property
    def facts(self) -> Facts: ...

    def embed(self, token_ids: Sequence[int], start: int = 0) -> torch.Tensor: ...

    async def forward(
        self, inputs: torch.Tensor, *, rows: Sequence[int] | None = None, blocks: Span | None = None, keep: bool = True
    ) -> Pass: ...

    async def loss(self, hidden: torch.Tensor, texts: Sequence[Sequence[int]]) -> tuple[float, torch.Tensor]: ...

    async def open_span(self, begin: SpanBegin, peer: PeerId | None = None) -> SpanLane: ...


class SpanTraining:
    """Copies of some spans of `model`, all at the same step. Made by `open_span_training`."""

    def __init__(self, model: Model, lanes: Sequence[SpanLane]) -> None:
        self._model = model
        self._lanes = tuple(lanes)
        self._parts = _parts(Span(0, model.facts.block_count), lanes)

    def __repr__(self) -> str:
        return f"<SpanTraining {' '.join(str(lane.span) for lane in self._lanes)} step={self.step}>"

    @property
    def step(self) -> int:
        """How many steps the copies are away from the published weights."""
        return self._lanes[0].step

    @property
    def max_rate(self) -> float:
        """The greatest learning rate that all peers allow."""
        return min(lane.begun.max_rate for lane in self._lanes)

    @property
    def max_steps(self) -> int:
        """The most steps that all peers allow."""
        return min(lane.begun.max_steps for lane in self._lanes)

    async def accumulate(self, texts: Sequence[Sequence[int]]) -> float:
        """Add the gradients of the mean loss of predicting each text's tokens, from the second on; returns the loss.

        Raises PeerdError. Where it failed in the backward, some copies may have gradients of these texts already.
        """
        if len({lane.step for lane in self._lanes}) > 1:
            raise InvalidRequest("one of the copies has missed a step: open the training again")
        rows = tuple(len(text) for text in texts)
        if min(rows, default=0) < 2:
            raise InvalidRequest("a text to train on has two tokens at least")
        if max(rows) > (limit := self._model.facts.max_length):
            raise ContextTooLong(f"a text of {max(rows)} tokens: the model takes {limit}; cut it")
        hidden = torch.cat([self._model.embed(text) for text in texts])
        done: list[Pass | SpanForward] = []
        try:
            for part in self._parts:
                if isinstance(part, SpanLane):
                    done.append(await part.forward(rows, hidden))
                else:
                    # Before the first trained block nothing needs a gradient.
                    keep = bool(done) and any(isinstance(each, SpanForward) for each in done)
                    done.append(await self._model.forward(hidden, rows=rows, blocks=part, keep=keep))
                hidden = done[-1].output
            loss, grad = await self._model.loss(hidden, texts)
            while any(isinstance(each, SpanForward) for each in done):
                last, part = done.pop(), self._parts[len(done)]
                if isinstance(last, SpanForward):
                    assert isinstance(part, SpanLane)
                    grad = await part.backward(last, grad)
                else:
                    grad = (await last.backward(grad)).hidden
        finally:
            for each in done:
                if not isinstance(each, SpanForward):
                    each.close()
        return loss

    async def update(self, rate: float, clip: float = 0.0) -> float:
        """Have all copies take a step; returns the norm of the gradients. `clip` is the largest norm of each copy's.

        Raises InvalidRequest for more than the peers allow, before any of them takes the step.
        """
        for lane in self._lanes:
            if rate > lane.begun.max_rate:
                raise InvalidRequest(f"a learning rate of {rate:g}: {lane.peer} allows {lane.begun.max_rate:g} at most")
            if lane.step >= lane.begun.max_steps:
                limit = lane.begun.max_steps
                raise InvalidRequest(
                    f"step {lane.step + 1}: {lane.peer} allows {limit} steps from the published weights"
                )
        norms = await _all_of([partial(lane.update, rate, clip) for lane in self._lanes])
        return float(torch.tensor(norms).norm())

    async def save(self) -> dict[int, bytes]:
        """Have all peers write a snapshot; returns the digests of the trained blocks."""
        found: dict[int, bytes] = {}
        for digests in await _all_of([lane.save for lane in self._lanes]):
            found |= digests
        return found

    async def publish(self, blocks: dict[int, bytes]) -> bytes:
        """Have all peers serve what was saved as another model; returns its digest."""
        digests = set(await _all_of([partial(lane.publish, blocks) for lane in self._lanes]))
        if len(digests) != 1:
            raise InvalidRequest("the peers disagree about the digest of the trained model")
        return digests.pop()


@asynccontextmanager
async def open_span_training(
    model: Model,
    spans: Sequence[Span],
    *,
    optimizer: str = "adamw",
    decay: float = 0.0,
    step: int | None = None,
    peer: PeerId | None = None,
) -> AsyncIterator[SpanTraining]:
    """Open copies of spans, at the newest step of which all have a snapshot, or at `step`; 0: the published weights.

    peer: the only peer to ask. Raises the error with which the peers refuse, and NotServed.
    """
    ordered = sorted(spans)
    if not ordered or any(one.end > two.start for one, two in pairwise(ordered)):
        raise InvalidRequest("the spans to train are one or more, and have no block in common")
    begins = [
        SpanBegin(model.facts.digest, span.start, span.end, optimizer=optimizer, decay=decay, step=step)
        for span in ordered
    ]
    lanes: list[SpanLane] = []
    try:
        for begin in begins:
            lanes.append(await model.open_span(begin, peer))
        if len({lane.step for lane in lanes}) > 1:
            # Some had saved a later step than others when they were interrupted.
            common = max(set.intersection(*({0, *lane.begun.saved} for lane in lanes)))
            while lanes:
                lanes.pop().close()
            for begin in begins:
                lanes.append(await model.open_span(replace(begin, step=common), peer))
        yield SpanTraining(model, lanes)
    finally:
        for lane in lanes:
            lane.close()


async def _all_of(functions: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of all functions, which run at the same time. The first PeerdError is raised when all have ended: a
    request that was cancelled would end its stream.
    """

    async def caught(function: Callable[[], Awaitable[T]]) -> T | PeerdError:
        try:
            return await function()
        except PeerdError as error:
            return error

    results: list[T] = []
    for result in await at_once([partial(caught, function) for function in functions]):
        if isinstance(result, PeerdError):
            raise result
        results.append(result)
    return results


def _parts(whole: Span, lanes: Sequence[SpanLane]) -> list[SpanLane | Span]:
    """The model's blocks in order: trained spans, and what is between them."""
    parts: list[SpanLane | Span] = []
    at = whole.start
    for lane in lanes:
        if at < lane.span.start:
            parts.append(Span(at, lane.span.start))
        parts.append(lane)
        at = lane.span.end
    if at < whole.end:
        parts.append(Span(at, whole.end))
    return parts

"""Draws tokens from the last block's results with the model's head, for the sessions whose last hop is here.

The logits of all sessions that wait are computed together, up to a number of positions: a row of logits is as wide as
the vocabulary, and nobody may make us hold thousands of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peerd.exchange.head_task import HeadTask
from peerd.exchange.sampler import DrawParams, Sampler, log_probabilities
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.messages.drawing import Sampling, TokenPairs

# Positions whose logits exist at the same time: 64 MiB for a vocabulary of 256k.
POSITIONS_AT_ONCE = 64
# A session with many positions lets others go between so many of them.
_SESSION_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is drawn: for `position` of `row`, after all tokens of `context` (or a stand-in as long)."""

    row: int
    position: int
    context: Sequence[int]


class TokenSource:
    """How a session's tokens are drawn. Raises InvalidRequest for parameters that nothing can be drawn by."""

    def __init__(self, sampling: Sampling) -> None:
        try:
            self.params = DrawParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                frequency_penalty=sampling.frequency_penalty,
                presence_penalty=sampling.presence_penalty,
                logit_bias=sampling.logit_bias,
                seed=sampling.seed,
                min_new_tokens=sampling.min_new_tokens,
                eos_token_ids=sampling.ends,
            )
        except ValueError as error:
            raise InvalidRequest(f"sampling: {error}") from None
        self.most = self.params.deciding if sampling.logprobs is None else None
        self._sampler = Sampler(self.params)
        self._prompt_length = sampling.prompt_length
        self._logprobs = sampling.logprobs

    def __repr__(self) -> str:
        return f"<TokenSource {self.params}>"

    def draw(self, logits: torch.Tensor, places: Sequence[Place]) -> list[TokenPairs]:
        """A token for each place, by logits `[places, vocabulary]`. Blocks. Raises BadResult."""
        drawn: list[TokenPairs] = []
        for scores, place in zip(logits, places, strict=True):
            token = self._sampler.pick(
                scores, place.context, row=place.row, position=place.position, prompt_length=self._prompt_length
            )
            pairs = ((token, None),) if self._logprobs is None else log_probabilities(scores, token, self._logprobs)
            drawn.append(pairs)
        return drawn


class ServedHead:
    """A model's head on this server, in `task`. `run` owns its thread. `worked` is called after each piece of work."""

    def __init__(self, task: HeadTask) -> None:
        self._task = task
        self.worked: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<ServedHead vocabulary={self._task.vocab_size}>"

    async def run(self) -> None:
        """Compute logits until cancelled."""
        await self._task.run()

    async def draw(self, hidden: torch.Tensor, source: TokenSource, places: Sequence[Place]) -> list[TokenPairs]:
        """A token for each place, from the last block's results for it, `[places, width]`. Raises BadResult,
        InvalidRequest.
        """
        self._check(source.params, places)
        drawn: list[TokenPairs] = []
        for start in range(0, len(places), _SESSION_AT_ONCE):
            part = slice(start, start + _SESSION_AT_ONCE)
            logits = await self._task.logits(hidden[part], source.most)
            drawn += await self._task.in_thread(source.draw, logits, places[part])
            self.worked()
        return drawn

    def _check(self, params: DrawParams, places: Sequence[Place]) -> None:
        """Refuse tokens of another vocabulary, which penalties would look up."""
        if params.reads_context:
            largest = max((max(place.context, default=0) for place in places), default=0)
            if largest >= self._task.vocab_size:
                raise InvalidRequest(f"token {largest} is not one of the model's {self._task.vocab_size}")

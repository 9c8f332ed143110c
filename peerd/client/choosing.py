"""Draws the tokens of one answer from a step's logits: the next one, and those that a step's guesses got right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peerd.client.picked import TokenLogprobs
from peerd.client.sampling import SamplingParams
from peerd.exchange.sampler import Sampler, log_probabilities

if TYPE_CHECKING:
    from peerd.client.grammars.constraint import RowConstraint


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that was drawn. `ends`: it ends the row."""

    token_id: int
    logprobs: TokenLogprobs | None
    ends: bool


class Chooser:
    """Draws for all rows of an answer to a prompt of `prompt_length` tokens. Runs in a worker thread.

    `top_logprobs` asks for logprobs with that many alternatives.
    """

    def __init__(self, prompt_length: int, sampling: SamplingParams, top_logprobs: int | None) -> None:
        self._prompt_length = prompt_length
        self._sampling = sampling
        self._sampler = Sampler(sampling)
        self._top_logprobs = top_logprobs

    def choices(
        self,
        logits: torch.Tensor,
        context: Sequence[int],
        draft: Sequence[int],
        *,
        row: int,
        constraint: RowConstraint | None,
    ) -> Iterator[Choice]:
        """Draw a token after each position, up to the first that is not what was guessed, or that ends the row.

        `logits` `[1 + guesses, vocabulary]` come after the `context`, which is the prompt and the row's tokens so far,
        and after each guess of the `draft`. Raises InvalidRequest if the row's `constraint` cannot be followed, and
        BadResult.
        """
        # A copy: a thread that was abandoned goes on while the caller continues.
        context = list(context)
        for scores, guess in zip(logits, (*draft, None), strict=True):
            token_id = self._sampler.pick(
                scores,
                context,
                row=row,
                position=len(context),
                prompt_length=self._prompt_length,
                allowed=None if constraint is None else constraint.allowed(self._answer(context), len(scores)),
            )
            context.append(token_id)
            ends = token_id in self._sampling.eos_token_ids
            if constraint is not None and not ends:
                ends = constraint.is_over(self._answer(context))
            yield Choice(token_id, self._logprobs(scores, token_id), ends)
            if ends or token_id != guess:
                return

    def _answer(self, context: list[int]) -> list[int]:
        return context[self._prompt_length :]

    def _logprobs(self, logits: torch.Tensor, token_id: int) -> TokenLogprobs | None:
        if self._top_logprobs is None:
            return None
        return logprobs_of(logits, token_id, self._top_logprobs)


def logprobs_of(logits: torch.Tensor, token_id: int, top: int) -> TokenLogprobs:
    """The log-probability of a token by logits `[vocabulary]`, and the `top` most likely tokens."""
    (_, own), *best = log_probabilities(logits, token_id, top)
    return TokenLogprobs(own, tuple(best))


def logprobs_of_all(logits: torch.Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """For each row of logits `[n, vocabulary]` what `logprobs_of` says of one token."""
    return [logprobs_of(row, token, top) for row, token in zip(logits, token_ids, strict=True)]

"""Has the last hop of a chain draw an answer's tokens, where it can: what is to be drawn, and what came back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peerd.client.choosing import Choice
from peerd.client.picked import TokenLogprobs
from peerd.client.sampling import SamplingParams
from peerd.client.session.hops.draw_sender import DrawRequest
from peerd.client.speculation.speculation import MOST_DRAFTED
from peerd.protocol.messages.drawing import (
    MAX_ALTERNATIVES,
    MAX_BIASES,
    MAX_DRAWN,
    MAX_ENDS,
    Sampling,
    TokenPairs,
)


class RemoteHead:
    """What one answer asks of a last hop that draws tokens."""

    def __init__(self, sampling: SamplingParams, prompt_length: int, logprobs: int | None, vocab_size: int) -> None:
        self._reads_context = sampling.reads_context
        self._ends = frozenset(sampling.eos_token_ids)
        self._vocab_size = vocab_size
        self._sampling = Sampling(
            temperature=float(sampling.temperature),
            top_k=sampling.top_k,
            top_p=float(sampling.top_p),
            min_p=float(sampling.min_p),
            repetition_penalty=float(sampling.repetition_penalty),
            frequency_penalty=float(sampling.frequency_penalty),
            presence_penalty=float(sampling.presence_penalty),
            logit_bias=tuple((token, float(bias)) for token, bias in sampling.logit_bias),
            seed=sampling.seed,
            min_new_tokens=sampling.min_new_tokens,
            ends=sampling.eos_token_ids,
            prompt_length=prompt_length,
            logprobs=logprobs,
        )

    def __repr__(self) -> str:
        return f"<RemoteHead {self._sampling}>"

    def request(self, contexts: Mapping[int, Sequence[int]], *, rows: Sequence[int] = ()) -> DrawRequest:
        """What to draw from a step after whose positions the rows have these tokens; see `DrawRequest`."""
        return DrawRequest(self._sampling, self._vocab_size, contexts if self._reads_context else {}, tuple(rows))

    def choices(self, drawn: Sequence[TokenPairs], draft: Sequence[int]) -> Iterator[Choice]:
        """The tokens of one row, up to the first that is not what was guessed, or that ends the row: see
        `Chooser.choices`.
        """
        for ((token, value), *best), guess in zip(drawn, (*draft, None), strict=True):
            logprobs = None
            if value is not None:
                logprobs = TokenLogprobs(value, tuple((other, own) for other, own in best if own is not None))
            ends = token in self._ends
            yield Choice(token, logprobs, ends)
            if ends or token != guess:
                return


def can_be_remote(sampling: SamplingParams, logprobs: int | None, rows: int) -> bool:
    """Whether a last hop can draw such an answer. What it cannot, the client draws with its own head."""
    return (
        sampling.grammar is None
        and (logprobs is None or logprobs <= MAX_ALTERNATIVES)
        and len(sampling.logit_bias) <= MAX_BIASES
        and len(sampling.eos_token_ids) <= MAX_ENDS
        and rows * (1 + MOST_DRAFTED) <= MAX_DRAWN
    )

"""Picks the next token from logits, with Transformers' own logits processors and a draw of our own.

The client does so with its own head, or the last hop with the one that it serves. The same token must come out in both
places, when a step is replayed, after a failover and in another process, however many draws were made before. So a draw
is a hash of (seed, row, position) instead of the next number of a generator.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from peerd.protocol.errors import BadResult

SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class DrawParams:
    """How a token is chosen from logits. Raises ValueError, which names the field that is out of range.

    `temperature` 0 takes the most likely token; then `top_k`, `top_p`, `min_p` and `seed` have no effect. `top_k` 0,
    `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off. `frequency_penalty` is subtracted from a logit for each
    time that the answer already contains the token, `presence_penalty` once if it contains it at all; `logit_bias`
    (pairs of token id and number) is added. None of `eos_token_ids` is chosen before `min_new_tokens`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check("temperature", self.temperature, _is_number(self.temperature) and self.temperature >= 0, "0 or more")
        check("top_k", self.top_k, is_integer(self.top_k) and self.top_k >= 0, "a whole number, 0 or more")
        check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "more than 0, at most 1")
        check("min_p", self.min_p, _is_number(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        check("repetition_penalty", penalty, _is_number(penalty) and penalty > 0, "more than 0")
        for name in ("frequency_penalty", "presence_penalty"):
            check(name, getattr(self, name), _is_number(getattr(self, name)), "a number")
        bias_fits = all(is_integer(token) and token >= 0 and _is_number(bias) for token, bias in self.logit_bias)
        check("logit_bias", self.logit_bias, bias_fits, "token ids with a number each")
        seed_fits = is_integer(self.seed) and abs(self.seed) < 2**SEED_BITS
        check("seed", self.seed, seed_fits, f"a whole number of {SEED_BITS} bits and a sign")
        eos_fit = all(is_integer(token) and token >= 0 for token in self.eos_token_ids)
        check("eos_token_ids", self.eos_token_ids, eos_fit, "token ids")

    @property
    def deciding(self) -> int | None:
        """How many of the largest logits decide the draw; None if others may, too.

        Penalties and biases may lift any token above the largest.
        """
        return self._deciding()

    def _deciding(self) -> int | None:
        if self.reads_context or self.logit_bias:
            return None
        most = 1 if self.temperature == 0 else self.top_k
        # The tokens that would end the answer too soon are taken from the largest.
        return most + (len(self.eos_token_ids) if self.min_new_tokens else 0) if most else None

    @property
    def reads_context(self) -> bool:
        """Whether a draw depends on which tokens came before, and not only on how many."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


class Sampler:
    """Picks tokens by `params`. Keeps no state: the same arguments always pick the same token."""

    def __init__(self, params: DrawParams) -> None:
        self.params = params
        self._processors = _processors(params)
        self._reads_context = params.repetition_penalty != 1

    def __repr__(self) -> str:
        return f"<Sampler {self.params}>"

    def pick(
        self,
        logits: torch.Tensor,
        context: Sequence[int] | torch.Tensor,
        *,
        row: int,
        position: int,
        prompt_length: int | None = None,
        allowed: torch.Tensor | None = None,
    ) -> int:
        """The token for `position` of `row`, given `logits` `[vocabulary]` and the `context`: all tokens before it.

        The first `prompt_length` of them (default: all) were given, the rest were picked. If the parameters do not
        `reads_context`, only the length of the context counts. `allowed`, a bool for each token, excludes others.
        Raises BadResult if the logits are not finite.
        """
        answer = context[len(context) if prompt_length is None else prompt_length :]
        scores = self.scores(self._adjusted(logits, answer, allowed), context)
        if self.params.temperature == 0:
            token = int(scores.argmax())
            # NaN and infinity win argmax; -inf wins it only if there is nothing else.
            if not math.isfinite(scores[token].item()):
                raise BadResult(f"the logits of position {position} are not finite")
            return token
        cumulative = scores.double().softmax(dim=-1).cumsum_(dim=-1)
        total = cumulative[-1].item()
        if not math.isfinite(total):
            raise BadResult(f"the logits of position {position} are not finite")
        # Rounding must not lift a draw to the total itself, beyond which there is no token.
        place = min(draw(self.params.seed, row, position) * total, math.nextafter(total, 0.0))
        return int(torch.searchsorted(cumulative, place, right=True))

    def _adjusted(
        self, logits: torch.Tensor, answer: Sequence[int] | torch.Tensor, allowed: torch.Tensor | None
    ) -> torch.Tensor:
        params = self.params
        is_short = len(answer) < params.min_new_tokens
        is_penalised = params.frequency_penalty or params.presence_penalty
        if not (is_penalised or params.logit_bias or is_short) and allowed is None:
            return logits
        logits = logits.float().clone()
        if is_penalised:
            for token, count in Counter(torch.as_tensor(answer).tolist()).items():
                logits[token] -= params.frequency_penalty * count + params.presence_penalty
        for token, bias in params.logit_bias:
            if token < len(logits):
                logits[token] += bias
        if allowed is not None:
            logits[~allowed] = -math.inf
        ends = [token for token in params.eos_token_ids if token < len(logits)]
        # A grammar may allow nothing but the end.
        if is_short and (allowed is None or not _only(ends, allowed)):
            logits[ends] = -math.inf
        return logits

    def scores(self, logits: torch.Tensor, context: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """`logits` `[vocabulary]` after the processors: excluded tokens are -inf."""
        ids = torch.as_tensor(context if self._reads_context else (), dtype=torch.long)
        processed: torch.Tensor = self._processors(ids[None], logits.float()[None])  # type: ignore[arg-type]
        return processed[0]


def draw(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that depends only on its three arguments: 53 bits of their sha256."""
    digest = hashlib.sha256(b"peerd sampling 1" + struct.pack("<qIQ", seed, row, position)).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53


def log_probabilities(logits: torch.Tensor, token_id: int, top: int) -> tuple[tuple[int, float], ...]:
    """By logits `[vocabulary]`: a token with its log-probability, and then the `top` most likely ones with theirs."""
    scores = logits.float().log_softmax(-1)
    values, ids = scores.topk(min(top, len(scores)))
    found = [(token_id, float(scores[token_id])), *zip(ids.tolist(), values.tolist(), strict=True)]
    # Rounding must not make one certain beyond measure.
    return tuple((token, min(value, 0.0)) for token, value in found)


def _only(tokens: Sequence[int], allowed: torch.Tensor) -> bool:
    return int(allowed.sum()) == int(allowed[list(tokens)].sum())


def _processors(params: DrawParams) -> LogitsProcessorList:
    """The processors in the order in which Transformers' `generate` applies them."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.temperature == 0:
        return processors
    if params.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(float(params.top_p)))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(float(params.min_p)))
    return processors


def is_integer(value: object) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def check(name: str, value: object, fits: bool, wanted: str) -> None:
    """Raise ValueError, which names the field, unless its value `fits`."""
    if not fits:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")

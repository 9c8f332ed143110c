"""What a caller may ask of an answer: how its tokens are drawn, and when it ends."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from peerd.client.grammars.grammar import Grammar
from peerd.exchange.sampler import SEED_BITS, DrawParams, check, is_integer

# Long enough for an answer, and short enough not to reserve a server's KV pool for a model that never stops.
DEFAULT_MAX_NEW_TOKENS = 256
# The default of Transformers' `generate` if a model's generation config names none.
DEFAULT_TOP_K = 50


@dataclass(frozen=True, slots=True)
class SamplingParams(DrawParams):
    """How tokens are chosen (`DrawParams`), and when to stop. Raises ValueError, which names the field that is out of
    range.

    Generation ends with a token of `eos_token_ids`, or after `max_new_tokens`. With a `grammar` only tokens are chosen
    that it allows, it may end where the grammar may, and it ends where nothing else may follow.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        # `super()` would name the class from before its slots were made.
        DrawParams.__post_init__(self)
        limit, least = self.max_new_tokens, self.min_new_tokens
        check("max_new_tokens", limit, is_integer(limit) and limit >= 1, "a whole number, 1 or more")
        check("min_new_tokens", least, is_integer(least) and 0 <= least <= limit, "from 0 to max_new_tokens")

    def _deciding(self) -> int | None:
        # A grammar, too, may lift any token above the largest.
        return None if self.grammar is not None else DrawParams._deciding(self)

    @classmethod
    def from_config(
        cls,
        config: GenerationConfig,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        logit_bias: Sequence[tuple[int, float]] | None = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """The caller's choices. For each that is None, the model's own, or else the default of Transformers'
        `generate`.

        A model whose config does not set `do_sample` is greedy unless a `temperature` is given. Without a `seed` every
        call draws a new one. Raises ValueError as the class does.
        """
        own_temperature = _first(config.temperature, 1.0) if config.do_sample else 0.0
        return cls(
            temperature=_first(temperature, own_temperature),
            top_k=_first(top_k, config.top_k, DEFAULT_TOP_K),
            top_p=_first(top_p, config.top_p, 1.0),
            min_p=_first(min_p, config.min_p, 0.0),
            repetition_penalty=_first(repetition_penalty, config.repetition_penalty, 1.0),
            frequency_penalty=_first(frequency_penalty, 0.0),
            presence_penalty=_first(presence_penalty, 0.0),
            logit_bias=tuple(logit_bias or ()),
            seed=secrets.randbits(SEED_BITS) if seed is None else seed,
            max_new_tokens=_first(max_new_tokens, config.max_new_tokens, DEFAULT_MAX_NEW_TOKENS),
            min_new_tokens=_first(min_new_tokens, 0),
            eos_token_ids=_token_ids(config.eos_token_id) if eos_token_ids is None else tuple(eos_token_ids),
            grammar=grammar,
        )


def _first(*choices: Any) -> Any:
    return next(choice for choice in choices if choice is not None)


def _token_ids(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)

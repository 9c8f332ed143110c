"""What decoding gives out: a token of an answer, with its text, its log-probabilities and the reason of its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token by the model itself (before temperature and filters), and its most likely
    tokens.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


PromptLogprobs = tuple[TokenLogprobs | None, ...]
"""Those of each token of a prompt. The first one, which nothing comes before, has none."""


@dataclass(frozen=True, slots=True)
class Picked:
    """One token of one row. `text` is the text that it completes; `finish` is set on the row's last token, with the
    reason, and `stop` is the stop text that ended it, if one did. `prompt` comes with a row's first token, if it was
    asked for.
    """

    row: int
    id: int
    position: int
    text: str
    logprobs: TokenLogprobs | None
    finish: Finish | None
    stop: str | None = None
    prompt: PromptLogprobs | None = None

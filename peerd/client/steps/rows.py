"""The rows of an answer while it is decoded, and what a step says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peerd.client.picked import PromptLogprobs
from peerd.client.text_stream import StopFilter, TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from peerd.client.grammars.constraint import RowConstraint
    from peerd.protocol.messages.drawing import TokenPairs


@dataclass(slots=True, eq=False)
class Row:
    """`context` is the prompt and the row's tokens so far."""

    number: int
    text: TextStream
    stops: StopFilter
    context: list[int]
    prompt_length: int
    constraint: RowConstraint | None = None
    finished: bool = False

    @property
    def count(self) -> int:
        """How many tokens the row has."""
        return len(self.context) - self.prompt_length


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """A step's answer for one row: what the last block gave out, `[1 + guesses, width]`, for the row's last token and
    for each guess, and the logits after them, `[1 + guesses, vocabulary]`. Or the tokens that the last hop drew there;
    then there are no hidden states.

    `prompt` comes with the first one, if it was asked for.
    """

    row: Row
    draft: tuple[int, ...]
    hidden: torch.Tensor | None
    logits: torch.Tensor | Sequence[TokenPairs]
    prompt: PromptLogprobs | None = None

"""What a drafter is: it guesses the next tokens of a text, and says how sure it is in classes that can be counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from peerd.client.speculation.confidence import Ask

if TYPE_CHECKING:
    import torch

# Guesses of n-grams from this place on are counted together.
_LAST_PLACE = 8


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens, in order, that follow a text.

    grade: a small number that the drafter gives to guesses of one kind, such as the length of the match that it found.
        How often guesses of a grade are right is counted for each grade and place apart (`Acceptance`).
    grades: a grade for each token instead, such as how sure a model is of it. Then places are counted together.
    """

    tokens: tuple[int, ...] = ()
    grade: int = 0
    grades: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def kind(self, place: int) -> tuple[int, int]:
        """The class in which the token at `place` is counted."""
        return (self.grades[place], 0) if self.grades else (self.grade, min(place, _LAST_PLACE))


class Drafter(Protocol):
    """Guesses how one text goes on, at no cost. It is asked about a text that grows, and keeps what it needs of it.

    It is asked before every step, also where no guess will be sent, to learn whether its guesses would be right; so a
    guess must cost next to nothing.
    """

    def propose(self, text: Sequence[int], count: int) -> Draft:
        """At most `count` tokens that may follow `text`, all tokens so far. Fewer, or none, if it has no idea."""


class CostlyDrafter(Protocol):
    """Guesses how one text goes on, and takes time for it, before the step. It is asked only where that may pay.

    Its drafts have `grades` of `confidence.grade_of`.
    """

    @property
    def ready(self) -> bool:
        """Whether it can guess now. It may still be reading the prompt, or have given up."""

    @property
    def reading_s(self) -> float:
        """How long the last proposal took, before its first token, to read what the text had gained in a long pause.
        It says nothing about the next one.
        """

    async def propose(self, text: Sequence[int], ask: Ask) -> Draft:
        """Tokens that may follow `text`, as `ask` says."""

    def computed(self, start: int, hidden: torch.Tensor) -> None:
        """Take what the last block gave out, `[n, width]`, for the text's positions from `start` on."""

    def end(self) -> None:
        """Free what it holds: the answer has ended."""

"""What a drafter is: it guesses the next tokens of a text, and says how sure it is in classes that can be counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens, in order, that follow a text.

    grade: a small number that the drafter gives to guesses of one kind, such as the length of the match that it found.
        How often guesses of a grade are right is counted for each grade apart (`Acceptance`).
    """

    tokens: tuple[int, ...] = ()
    grade: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


class Drafter(Protocol):
    """Guesses how one text goes on. It is asked about a text that grows, and keeps what it needs of it.

    It is asked before every step, also where no guess will be sent, to learn whether its guesses would be right; so a
    guess must cost next to nothing.
    """

    def propose(self, text: Sequence[int], count: int) -> Draft:
        """At most `count` tokens that may follow `text`, all tokens so far. Fewer, or none, if it has no idea."""

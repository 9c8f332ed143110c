"""Counts how often guesses were right, by grade and by their place in a draft.

Every guess is counted, whether it was sent or not: the text shows afterwards what it should have been. So it costs
nothing to learn that a drafter would win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peerd.client.speculation.confidence import ALL_GRADES, GRADES, prior_share
from peerd.client.speculation.drafts import Draft

# That opinion, and what earlier answers say, weigh as much as this many guesses.
_PRIOR_SEEN = 2.0
# Old guesses fade, so that a text that turns from prose to code is noticed: the last 32 or so of a kind count.
_FADE = 1 - 1 / 32


@dataclass(slots=True)
class _Count:
    right: float
    seen: float

    def note(self, right: bool) -> None:
        self.right = self.right * _FADE + right
        self.seen = self.seen * _FADE + 1


class Acceptance:
    """How likely each token of a draft is right, given that those before it are.

    One answer's counts begin with what `general` says of all answers before it.
    """

    def __init__(self, general: Acceptance | None = None) -> None:
        self._general = general
        self._counts: dict[tuple[int, int], _Count] = {}

    def likely(self, draft: Draft) -> list[float]:
        """For each token of `draft`, the probability that it and all before it are right."""
        chances = []
        chance = 1.0
        for place in range(len(draft)):
            chance *= self.share(*draft.kind(place))
            chances.append(chance)
        return chances

    def share(self, grade: int, place: int) -> float:
        """The share of right tokens at `place` of drafts of this grade, where those before it were right."""
        count = self._count(grade, place)
        return count.right / count.seen

    @property
    def by_grade(self) -> Mapping[int, float]:
        """For each grade of a draft model's guesses, the share of right ones."""
        return {grade: self.share(grade, 0) for grade in GRADES}

    @property
    def of_model(self) -> float:
        """The share of right ones among all of a draft model's guesses."""
        return self.share(*ALL_GRADES)

    def note(self, draft: Draft, place: int, right: bool) -> None:
        """Count the token at `place`, when those before it were right."""
        self._count(*draft.kind(place)).note(right)
        if draft.grades:
            self._count(*ALL_GRADES).note(right)
        if self._general is not None:
            self._general.note(draft, place, right)

    def _count(self, grade: int, place: int) -> _Count:
        key = (grade, place)
        if key not in self._counts:
            general = prior_share(grade) if self._general is None else self._general.share(*key)
            self._counts[key] = _Count(_PRIOR_SEEN * general, _PRIOR_SEEN)
        return self._counts[key]


class Watch:
    """Compares one text's drafts with how it went on."""

    def __init__(self, acceptance: Acceptance) -> None:
        self._acceptance = acceptance
        # Each draft whose end the text has not reached, with the position of its first token.
        self._open: list[tuple[Draft, int]] = []

    def proposed(self, draft: Draft, start: int) -> None:
        """Remember a draft whose first token is for position `start`."""
        if draft.tokens:
            self._open.append((draft, start))

    def came(self, token: int, position: int) -> None:
        """Note the text's next token. A draft is followed up to its first wrong token."""
        following = []
        for draft, start in self._open:
            place = position - start
            right = draft.tokens[place] == token
            self._acceptance.note(draft, place, right)
            if right and place + 1 < len(draft):
                following.append((draft, start))
        self._open = following

"""How sure a draft model is of a guess, in grades, and when it stops guessing.

A grade is a range of the probability that the model itself gives its guess. How often guesses of a grade are right is
counted: a model may be too sure, and the answer's tokens may be drawn at a temperature.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_BOUNDS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
# How often a guess of each range is right, before any was seen: as often as the model says.
_MIDDLES = (0.1, 0.28, 0.43, 0.58, 0.73, 0.85, 0.94, 0.98)
# Above the lengths of matches, which are the grades of n-grams.
_FIRST = 100
#: The grades of a draft model's guesses.
GRADES: Final = range(_FIRST, _FIRST + len(_MIDDLES))
#: The class in which all of a draft model's guesses are counted together.
ALL_GRADES: Final = (_FIRST - 1, 0)
#: How often a guess is right of whose kind nothing is known yet.
PRIOR_SHARE: Final = 0.5


def grade_of(chance: float) -> int:
    """The grade of a guess that its model gives this probability."""
    return GRADES[bisect_right(_BOUNDS, chance)]


def prior_share(grade: int) -> float:
    """How often a guess of a grade is right, before any was seen."""
    return _MIDDLES[grade - _FIRST] if grade in GRADES else PRIOR_SHARE


@dataclass(frozen=True, slots=True)
class Ask:
    """What a draft model is asked for: at most `count` tokens.

    It stops earlier, behind the first token with which the chance that all are right falls below `least`. `shares`
    says for each grade how often its guesses were right.
    """

    count: int
    least: float
    shares: Mapping[int, float]

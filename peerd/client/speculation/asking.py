"""Asks a text's model for guesses, in a worker thread, until another guess would not pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import trio

from peerd.client.speculation.confidence import Ask, grade_of
from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.step_times import MOST_DRAFTED


class Guessed(Protocol):
    """A token that may come next, and the probability that its model gives it."""

    @property
    def token(self) -> int: ...

    @property
    def chance(self) -> float: ...


class GuessedText(Protocol):
    """A text whose guesses a model of ours computes: a `GreedyText`, or a `HeadText`."""

    def behind(self, text: Sequence[int]) -> int:
        """How many positions of the text it has to read before it can guess."""

    def read(self, text: Sequence[int], pause: Callable[[], None]) -> None:
        """Read them. `pause` is called before each computation; it may raise."""

    def guesses(self, text: Sequence[int], pause: Callable[[], None]) -> Iterator[Guessed]:
        """What comes after `text`, token by token."""


def guess(text: GuessedText, tokens: Sequence[int], ask: Ask) -> tuple[Draft, float]:
    """A draft for `tokens`, and how many seconds went by to read what they had gained in a long pause.

    For a worker thread of Trio: it ends before its next token if the caller is cancelled.
    """
    pause = trio.from_thread.check_cancelled
    reading_s = _catch_up(text, tokens, pause)
    guessed: list[int] = []
    grades: list[int] = []
    chance = 1.0
    for each in islice(text.guesses(tokens, pause), ask.count):
        grades.append(grade_of(each.chance))
        guessed.append(each.token)
        chance *= ask.shares[grades[-1]]
        if chance < ask.least:
            break
    return Draft(tuple(guessed), grades=tuple(grades)), reading_s


def _catch_up(text: GuessedText, tokens: Sequence[int], pause: Callable[[], None]) -> float:
    if text.behind(tokens) <= MOST_DRAFTED + 1:
        return 0.0
    began = time.perf_counter()
    text.read(tokens, pause)
    return time.perf_counter() - began

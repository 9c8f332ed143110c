"""Decides before each step of an answer how many drafted tokens go along, so that drafting never loses.

A drafted position is worth the probability that it is right, and costs what it adds to the step. The controller adds
the likeliest positions as long as the expected tokens a second grow. What it does not know yet, it learns within a
budget: drafted steps may have cost at most one part in a hundred of the answer's time, and half a token.

Others whose sessions run on the same servers wait for our drafts as we wait for theirs. If everybody counted their own
gain only, all would lose. So a step counts the tokens of all sessions that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peerd.client.speculation.step_times import StepTimes

#: Which part of an answer's time drafting may cost it, and how many plain steps on top, for what has to be tried.
LOSS_SHARE = 0.01
LOSS_STEPS = 0.5
# How many plain steps' worth of won time can be lost again before drafting stops.
_MOST_SAVED_STEPS = 4.0
# Drafting must promise this much, for expected times and chances are measured, and noisy.
_LEAST_GAIN = 1.03
# What a drafted position costs at least, in plain steps. Without it a chain that seems to compute positions for nothing
# would be sent many unlikely ones, and lose much when it turns out to be loaded.
_POSITION_COST = 0.01
# An answer's first drafts are no longer than this, and then at most twice as long as those that were measured in it.
_FIRST_DRAFTED = 4
# After so many drafted steps in a row, one without measures again what plain decoding costs.
_PLAIN_EVERY = 64
# After so many plain steps, one guess is sent although measured times speak against it, where it is at least this
# likely: the chain may have been loaded when they were measured.
_RETRY_EVERY = 32
_LIKELY = 0.5
# A new measurement of a plain step weighs this much. The first few weigh equally.
_WEIGHT = 0.2
# A step that takes more than this many times the usual was disturbed (a peer died); it counts as this many.
_MOST_DISTURBED = 3.0


class Controller:
    """Chooses for one answer. `times` is shared by the answers of a model. Pure: the caller has the clock.

    others: how many tokens the other sessions get from a step in which ours takes part.
    """

    def __init__(self, times: StepTimes, others: Callable[[], float] = lambda: 0.0) -> None:
        self._times = times
        self._others = others
        self._plain_s = 0.0
        self._plain_steps = 0
        self._since_plain = 0
        self._since_drafted = 0
        self._most_drafted = 0
        self._elapsed_s = 0.0
        self._saved_s = 0.0

    def __repr__(self) -> str:
        return f"<Controller plain={self._plain_s:.3g} s saved={self._saved_s:.3g} s>"

    @property
    def limit(self) -> int:
        """How many positions may be drafted for the next step of all rows together."""
        if not self._plain_steps or self._since_plain >= _PLAIN_EVERY:
            return 0
        allowed_s = LOSS_SHARE * self._elapsed_s + LOSS_STEPS * self._plain_s
        if self._saved_s + allowed_s <= 0:
            return 0
        return min(self._times.allowed, max(_FIRST_DRAFTED, 2 * self._most_drafted))

    def choose(self, chances: Sequence[Sequence[float]]) -> list[int]:
        """How many of each row's drafted tokens to send.

        chances: for each row and each drafted token, the probability that it and those before it are right.
        """
        # Within a row they only fall, so the likeliest positions of all rows together begin each draft.
        ranked = sorted(((-chance, row) for row, row_chances in enumerate(chances) for chance in row_chances))
        tokens = len(chances) + self._others()
        best, best_count = tokens * _LEAST_GAIN, 0
        for count, (negative, _) in enumerate(ranked[: self.limit], 1):
            tokens -= negative
            rate = tokens / (self._times.ratio(count) + _POSITION_COST * count)
            if rate > best:
                best, best_count = rate, count
        if not best_count and self._may_retry(ranked):
            self._times.doubt()
            best_count = 1
        chosen = [0] * len(chances)
        for _, row in ranked[:best_count]:
            chosen[row] += 1
        return chosen

    def _may_retry(self, ranked: Sequence[tuple[float, int]]) -> bool:
        return self._since_drafted >= _RETRY_EVERY and self.limit > 0 and bool(ranked) and -ranked[0][0] >= _LIKELY

    def note(self, rows: int, drafted: int, gained: int, seconds: float) -> None:
        """A step of so many rows, with so many drafted positions, took `seconds` and gained so many tokens."""
        if not drafted:
            self._note_plain(seconds)
            self._elapsed_s += seconds
            return
        self._since_plain += 1
        self._since_drafted = 0
        self._most_drafted = max(self._most_drafted, drafted)
        if not self._plain_s:
            return
        ratio = seconds / self._plain_s
        counted = min(ratio, _MOST_DISTURBED * self._times.ratio(drafted))
        self._times.note(drafted, counted)
        self._elapsed_s += seconds
        saved_s = (gained / rows - counted) * self._plain_s
        self._saved_s = min(self._saved_s + saved_s, _MOST_SAVED_STEPS * self._plain_s)

    def _note_plain(self, seconds: float) -> None:
        self._since_plain = 0
        self._since_drafted += 1
        self._plain_steps += 1
        if self._plain_steps > 1:
            seconds = min(seconds, _MOST_DISTURBED * self._plain_s)
        self._plain_s += max(1 / self._plain_steps, _WEIGHT) * (seconds - self._plain_s)

"""Decides before each step of an answer how many drafted tokens go along, so that drafting never loses.

A drafted position is worth the probability that it is right, and costs what it adds to the step. The controller adds
the likeliest positions as long as the expected tokens a second grow. What it does not know yet, it learns within a
budget: drafted steps may have cost at most one part in a hundred of the answer's time, and half a token.

A draft model takes time before the step. So it is asked only where its guesses should pay for that time too, or now and
then to learn how good they are, and never where a wrong answer would cost more than half of what is left of the budget.

Others whose sessions run on the same servers wait for our drafts as we wait for theirs. If everybody counted their own
gain only, all would lose. So a step counts the tokens of all sessions that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from peerd.client.speculation.ahead import AheadTimes
from peerd.client.speculation.step_times import MOST_DRAFTED, StepTimes

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
# A draft model that should not pay is asked for a single token after so many steps, as far as the budget allows it.
_ASK_EVERY = 32
# The share of the allowed losses that asking a draft model may use up. The rest is for guesses that cost nothing.
_ASKING_SHARE = 0.5
# A new measurement of a plain step weighs this much. The first few weigh equally.
_WEIGHT = 0.2
# A step that takes more than this many times the usual was disturbed (a peer died); it counts as this many.
_MOST_DISTURBED = 3.0


class Beside(Enum):
    """What else of an answer was on its way when a step was sent."""

    NOTHING = auto()
    #: Windows before it, whose guesses were all right.
    RIGHT_GUESSES = auto()
    #: Windows that were given up.
    WRONG_GUESSES = auto()


@dataclass(frozen=True, slots=True)
class Asking:
    """How many tokens to ask of a draft model. Beyond the `least` chance that all are right, another costs too much."""

    count: int
    least: float


class Controller:
    """Chooses for one answer. `times` and `ahead` are shared by the answers of a model. Pure: the caller has the clock.

    others: how many tokens the other sessions get from a step in which ours takes part.
    """

    def __init__(
        self, times: StepTimes, others: Callable[[], float] = lambda: 0.0, ahead: AheadTimes | None = None
    ) -> None:
        self._times = times
        self._ahead = ahead or AheadTimes()
        self._others = others
        self._plain_s = 0.0
        self._plain_steps = 0
        self._since_plain = 0
        self._since_drafted = 0
        self._since_asked = _ASK_EVERY
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
        if self._saved_s + self._allowed_s <= 0:
            return 0
        return min(self._times.allowed, max(_FIRST_DRAFTED, 2 * self._most_drafted))

    @property
    def _allowed_s(self) -> float:
        """How much time drafting may have cost this answer."""
        return LOSS_SHARE * self._elapsed_s + LOSS_STEPS * self._plain_s

    def ask(self, free: Sequence[float], share: float, token_s: float, room: int) -> Asking | None:
        """What to ask of a draft model for the only row of an answer; None if nothing.

        free: the chances of the guesses that cost nothing, as in `choose`. share: how often a guess of the model is
        right. token_s: how long it takes for each.
        """
        if not self._plain_s or room < 1:
            return None
        cost = token_s / self._plain_s
        spare = (self._saved_s + _ASKING_SHARE * self._allowed_s) / self._plain_s
        best, asking, gain = self.rate(free), None, 0.0
        for count in range(1, min(self.limit, room) + 1):
            gain += share**count
            if count * cost + self._times.ratio(count) - 1 > spare:
                break
            rate = self._rate(1, gain, count, count * cost)
            if rate > best:
                # Another guess gains its chance, and costs what the same time gains without it.
                own = (1 + gain) / (self._step(count) + count * cost)
                best, asking = rate, Asking(count, own * (cost + _POSITION_COST) / share)
        if asking is None and self._since_asked >= _ASK_EVERY and self.limit and cost <= spare:
            asking = Asking(1, 1.0)
        if asking is not None:
            self._since_asked = 0
        return asking

    def rate(self, chances: Sequence[float]) -> float:
        """The tokens in a plain step's time, of all sessions, that a row with these guesses may expect at best."""
        return self._best(1, sorted((-chance, 0) for chance in chances))[0]

    def choose(self, chances: Sequence[Sequence[float]]) -> list[int]:
        """How many of each row's drafted tokens to send.

        chances: for each row and each drafted token, the probability that it and those before it are right.
        """
        # Within a row they only fall, so the likeliest positions of all rows together begin each draft.
        ranked = sorted(((-chance, row) for row, row_chances in enumerate(chances) for chance in row_chances))
        _, best_count = self._best(len(chances), ranked)
        if not best_count and self._may_retry(ranked):
            self._times.doubt()
            best_count = 1
        chosen = [0] * len(chances)
        for _, row in ranked[:best_count]:
            chosen[row] += 1
        return chosen

    def behind(self, chances: Sequence[float]) -> int:
        """How many of these guesses to send in a window behind those on their way; 0 if none.

        chances: for each guess, the probability that it and all before it are right, those on their way included.
        """
        if not chances or not self.limit:
            return 0
        if self.limit < min(len(chances), MOST_DRAFTED):
            # A longer window costs less than another one; what it takes must be measured first, and alone.
            return 0
        # If it counts, its first guess is the certain token of a step, and the others are that step's guesses.
        rest = [(-chance / chances[0], 0) for chance in chances[1:]]
        count = 1 + self._best(1, rest)[1]
        excess = self._step(count) - 1
        return count if self._ahead.worth(chances[:count], self._others(), excess) > 0 else 0

    def _best(self, rows: int, ranked: Sequence[tuple[float, int]]) -> tuple[float, int]:
        """The highest rate, and with how many of the likeliest guesses; drafting must win something to be chosen."""
        best, best_count, gain = (rows + self._others()) * _LEAST_GAIN, 0, 0.0
        for count, (negative, _) in enumerate(ranked[: self.limit], 1):
            gain -= negative
            rate = self._rate(rows, gain, count)
            if rate > best:
                best, best_count = rate, count
        return best, best_count

    def _rate(self, rows: int, gain: float, count: int, asking: float = 0.0) -> float:
        """The tokens in a plain step's time. While a draft model is asked, the others do not wait."""
        step = self._step(count)
        return (rows + gain) / (step + asking) + self._others() / step

    def _step(self, count: int) -> float:
        """How long a step with so many guesses takes, in plain steps."""
        return self._times.ratio(count) + _POSITION_COST * count

    def _may_retry(self, ranked: Sequence[tuple[float, int]]) -> bool:
        return self._since_drafted >= _RETRY_EVERY and self.limit > 0 and bool(ranked) and -ranked[0][0] >= _LIKELY

    def note(
        self,
        rows: int,
        drafted: int,
        gained: int,
        seconds: float,
        asking_s: float = 0.0,
        beside: Beside = Beside.NOTHING,
    ) -> None:
        """A step of so many rows, with so many drafted positions, took `seconds` and gained so many tokens.

        asking_s: how long a draft model was asked before it. beside: what else was on its way when it was sent.
        """
        self._since_asked += 1
        self._note_asking(asking_s)
        if beside is not Beside.NOTHING and self._plain_s:
            self._note_beside(rows, drafted, gained, seconds / self._plain_s, beside)
            self._elapsed_s += seconds
            return
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
        self._save((gained / rows - counted) * self._plain_s)

    def _note_beside(self, rows: int, drafted: int, gained: int, ratio: float, beside: Beside) -> None:
        """Note a step whose time was not its own: only what it has saved counts for the times of steps alone."""
        self._since_plain += 1
        counted = min(ratio, _MOST_DISTURBED * self._step(drafted))
        if beside is Beside.RIGHT_GUESSES:
            self._ahead.note_behind(counted)
        else:
            self._ahead.note_delayed(counted - self._times.ratio(drafted))
        self._save((gained / rows - counted) * self._plain_s)

    def _save(self, seconds: float) -> None:
        self._saved_s = min(self._saved_s + seconds, _MOST_SAVED_STEPS * self._plain_s)

    def _note_asking(self, seconds: float) -> None:
        self._elapsed_s += seconds
        self._saved_s -= seconds

    def _note_plain(self, seconds: float) -> None:
        self._since_plain = 0
        self._since_drafted += 1
        self._plain_steps += 1
        if self._plain_steps > 1:
            seconds = min(seconds, _MOST_DISTURBED * self._plain_s)
        self._plain_s += max(1 / self._plain_steps, _WEIGHT) * (seconds - self._plain_s)

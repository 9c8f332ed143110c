"""How long a chain takes for a step, learnt from the steps that it answered: after what time one is late.

Knows positions and seconds; knows no clock and asks nobody. The difficulty is that a prompt's piece and a token
differ a hundredfold, and that a chain under load is slow without being dead: so both are learnt apart, lateness
follows the mean and the deviation, as TCP's timeout does (RFC 6298), and doubles while nothing comes.
"""

from __future__ import annotations

from dataclasses import dataclass

from peerd.protocol.rows import DECODE_POSITIONS

# RFC 6298, section 2: gains of the smoothed time and of its deviation, and how many deviations are too many.
_GAIN = 1 / 8
_DEVIATION_GAIN = 1 / 4
_DEVIATIONS = 4
# Less is a hiccup: a collection of garbage, a burst of others' prompts.
FLOOR_S = 1.0
# Longer than this nobody waits before asking what is wrong.
CEILING_S = 30.0
# Before anything was answered: when to ask, which costs a message a hop.
UNKNOWN_S = 3.0


@dataclass(slots=True)
class _Smoothed:
    mean: float
    deviation: float

    def add(self, sample: float) -> None:
        self.deviation += _DEVIATION_GAIN * (abs(sample - self.mean) - self.deviation)
        self.mean += _GAIN * (sample - self.mean)

    @property
    def latest(self) -> float:
        """What a sample hardly ever exceeds: never less than twice the mean, however regular they were."""
        return self.mean + max(_DEVIATIONS * self.deviation, self.mean)


class Pace:
    """The pace of one session's chain."""

    def __init__(self) -> None:
        # Seconds a token, and seconds a position of a prompt.
        self._decode: _Smoothed | None = None
        self._prefill: _Smoothed | None = None
        self._doublings = 0

    def __repr__(self) -> str:
        return f"<Pace decode={self._decode} prefill={self._prefill} doubled={self._doublings}>"

    def took(self, positions: int, seconds: float) -> None:
        """A step of so many positions was answered, so long after it could be begun."""
        self._doublings = 0
        if positions <= DECODE_POSITIONS:
            self._decode = _added(self._decode, seconds)
        else:
            self._prefill = _added(self._prefill, seconds / positions)

    def doubled(self) -> None:
        """A hop was overtaken: be patient for twice as long, until something is answered."""
        self._doublings += 1

    def late_after_s(self, positions: int) -> float:
        """When to ask why a step of so many positions has no answer, in seconds after it could be begun."""
        expected = self.expected_s(positions)
        seconds = UNKNOWN_S if expected is None else expected
        return min(max(seconds, FLOOR_S) * 2.0**self._doublings, max(CEILING_S, seconds))

    def expected_s(self, positions: int) -> float | None:
        """Seconds within which so many positions should be computed; None where nothing is known."""
        decode, prefill = self._decode, self._prefill
        if positions <= DECODE_POSITIONS:
            if decode is not None:
                return decode.latest
            # A token takes no longer than a prompt's whole piece.
            return None if prefill is None else prefill.latest * 4 * DECODE_POSITIONS
        if prefill is not None:
            return prefill.latest * positions
        return None if decode is None else decode.latest * positions


def _added(smoothed: _Smoothed | None, sample: float) -> _Smoothed:
    if smoothed is None:
        # RFC 6298, section 2.2: after one sample nobody knows how much they vary.
        return _Smoothed(sample, sample / 2)
    smoothed.add(sample)
    return smoothed

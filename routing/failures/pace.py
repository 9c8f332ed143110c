"""Learns how long a chain takes for a step, and so after what time a step is late.

A piece of a prompt and a token differ a hundredfold in time, so each has its own statistics. A chain under load is
slow without being dead, so lateness follows the mean and the deviation, as TCP's timeout does (RFC 6298), and
doubles while no answer comes.
"""

from __future__ import annotations

from dataclasses import dataclass

from peerd.protocol.rows import DECODE_POSITIONS

# RFC 6298, section 2: gains of the smoothed time and of its deviation, and how many deviations are too many.
_GAIN = 1 / 8
_DEVIATION_GAIN = 1 / 4
_DEVIATIONS = 4
# A shorter delay is a hiccup: a garbage collection, a burst of other clients' prompts.
FLOOR_S = 1.0
# No user waits longer than this before we ask what is wrong.
CEILING_S = 30.0
# Before the first answer: when to ask, which costs one message to each hop.
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
        """A duration that a sample hardly ever exceeds: at least twice the mean, however regular the samples were."""
        return self.mean + max(_DEVIATIONS * self.deviation, self.mean)


class StepPace:
    """The pace of one session's chain."""

    def __init__(self) -> None:
        # Seconds for a token, and seconds for each position of a prompt.
        self._decode: _Smoothed | None = None
        self._prefill: _Smoothed | None = None
        self._doublings = 0

    def __repr__(self) -> str:
        return f"<StepPace decode={self._decode} prefill={self._prefill} doubled={self._doublings}>"

    def took(self, positions: int, seconds: float) -> None:
        """Note that a step of `positions` positions was answered `seconds` after it could begin."""
        self._doublings = 0
        if positions <= DECODE_POSITIONS:
            self._decode = _added(self._decode, seconds)
        else:
            self._prefill = _added(self._prefill, seconds / positions)

    def doubled(self) -> None:
        """Note that a hop was replaced for being late: wait twice as long until the next answer."""
        self._doublings += 1

    def late_after_s(self, positions: int) -> float:
        """After how many seconds, from when the step could begin, to ask why it has no answer."""
        expected = self.expected_s(positions)
        seconds = UNKNOWN_S if expected is None else expected
        return min(max(seconds, FLOOR_S) * 2.0**self._doublings, max(CEILING_S, seconds))

    def expected_s(self, positions: int) -> float | None:
        """Seconds within which so many positions should be computed; None if nothing is known."""
        decode, prefill = self._decode, self._prefill
        if positions <= DECODE_POSITIONS:
            if decode is not None:
                return decode.latest
            # A token takes no longer than a whole piece of a prompt.
            return None if prefill is None else prefill.latest * 4 * DECODE_POSITIONS
        if prefill is not None:
            return prefill.latest * positions
        return None if decode is None else decode.latest * positions


def _added(smoothed: _Smoothed | None, sample: float) -> _Smoothed:
    if smoothed is None:
        # RFC 6298, section 2.2: after one sample the variation is unknown, so assume half the sample.
        return _Smoothed(sample, sample / 2)
    smoothed.add(sample)
    return smoothed

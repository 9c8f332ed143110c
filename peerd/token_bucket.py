"""A rate with a burst: what may pass now, and how long the rest must wait.

Knows the time it is given. Who waits has paid already, so those who wait for one bucket pass in the order in
which they came, and none of them starves (the virtual scheduling algorithm, ITU-T I.371, annex A).
"""

from __future__ import annotations


class TokenBucket:
    """`rate` a second, and up to `burst` at once after a rest."""

    __slots__ = ("_burst_s", "_paid_until", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst_s = burst / rate
        self._paid_until = now - self._burst_s

    def take(self, count: float, now: float) -> float:
        """Pay for `count`. Returns for how many seconds to wait before using it."""
        self._paid_until = max(self._paid_until, now - self._burst_s) + count / self._rate
        return max(0.0, self._paid_until - now)

    def try_take(self, count: float, now: float) -> bool:
        """Pay for `count` if it can be used at once."""
        paid_until = max(self._paid_until, now - self._burst_s) + count / self._rate
        if paid_until > now:
            return False
        self._paid_until = paid_until
        return True

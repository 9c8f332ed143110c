"""Measures how long a step waits at a busy device. A server announces this, so that clients prefer idle servers.

It is computed from the times in which the device worked; the time is an argument. The wait must be known even when no
step is waiting, and the announced value is seconds old when it is read. So it is a mean over some seconds, which fades.
"""

from __future__ import annotations

import math

# A step takes at most a tenth of that, so one burst does not count as load. Announcements are 20 s apart.
MEMORY_S = 15.0


class BusyMeter:
    """The batches and training turns of one device. Older ones count exponentially less."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._at = 0.0
        # The sum of the lengths of all batches, and the sum of the squared lengths, both over `memory_s`.
        self._busy = 0.0
        self._queue_s = 0.0

    def __repr__(self) -> str:
        return f"<BusyMeter busy={self._busy:.0%} queue={self._queue_s / 2:.3g} s>"

    def ran(self, began: float, ended: float) -> None:
        """Note that the device worked from `began` to `ended`, in seconds."""
        length_s = ended - began
        self._fade(ended)
        self._busy += length_s / self._memory_s
        self._queue_s += length_s**2 / self._memory_s

    def queue_s(self, alone_s: float, now: float) -> float:
        """The seconds that a step takes beyond `alone_s`, the time for a step that has the device for itself.

        A step comes at a random moment. It falls into a long batch more probably than into a short one, so its mean
        wait is half of sum(length^2) / time (the residual time of Pollaczek and Khinchine). The next batch contains the
        steps of other sessions too, and takes as long as those before it.
        """
        self._fade(now)
        return self._queue_s / 2 + max(0.0, self._queue_s - min(self._busy, 1.0) * alone_s)

    def _fade(self, now: float) -> None:
        # For a time in the past, nothing fades.
        faded = math.exp(-max(0.0, now - self._at) / self._memory_s)
        self._busy *= faded
        self._queue_s *= faded
        self._at = max(self._at, now)

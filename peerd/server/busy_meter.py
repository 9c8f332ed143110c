"""How long a step waits at a busy device: what a server announces so that clients go where less is asked.

Knows when the device was at work, from which it reckons what a step that came at any moment would meet; knows
neither engines nor a clock (the time is an argument). The difficulty is that the wait must be known where nobody
waits just now, and that it is old by the time it is read: so it is a mean over some seconds, which fades by itself.
"""

from __future__ import annotations

import math

# A step takes a tenth of that at most: one burst is not a load. Announcements are 20 s apart.
MEMORY_S = 15.0


class BusyMeter:
    """Batches, and turns of training, of one device. Older ones count exponentially less."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._at = 0.0
        # Of all batches: the sum of their lengths, and of those squared, over `memory_s`.
        self._busy = 0.0
        self._queue_s = 0.0

    def __repr__(self) -> str:
        return f"<BusyMeter busy={self._busy:.0%} queue={self._queue_s / 2:.3g} s>"

    def ran(self, began: float, ended: float) -> None:
        """The device was at work from `began` to `ended`, in seconds."""
        length_s = ended - began
        self._fade(ended)
        self._busy += length_s / self._memory_s
        self._queue_s += length_s**2 / self._memory_s

    def queue_s(self, alone_s: float, now: float) -> float:
        """Seconds that a step takes beyond `alone_s`, which one takes that has the device for itself.

        It comes at any moment, and so into the middle of a batch, by whose length that batch is the likelier: half
        of sum(length^2) / time is what it waits on average (Pollaczek and Khinchine's residual time). The next
        batch has the others' steps too, and takes as long as those before it did.
        """
        self._fade(now)
        return self._queue_s / 2 + max(0.0, self._queue_s - min(self._busy, 1.0) * alone_s)

    def _fade(self, now: float) -> None:
        # Who looks at a time that is past sees what is known now.
        faded = math.exp(-max(0.0, now - self._at) / self._memory_s)
        self._busy *= faded
        self._queue_s *= faded
        self._at = max(self._at, now)

"""How many bytes a second a line takes, told by when its socket makes us wait.

Knows what was sent and when; knows no sockets and no clock (the time is an argument). The difficulty is the system's
own buffer, which takes megabytes at once and says nothing of the line. But a send that had to wait has just filled
it: between two such moments as many bytes went in at our end as the line took at the other.
"""

from __future__ import annotations

# A send that takes so long had to wait, rather than for its turn among our own tasks.
WAITED_S = 0.002
# Buffers grow while they are in use, to 4 MiB on Linux: what they took more counts for a half at most.
MIN_BYTES = 8 * 1024 * 1024
MIN_S = 0.25


class UplinkMeter:
    """Of one connection. `bytes_a_second` is what was measured last; None before anything was."""

    def __init__(self) -> None:
        self.bytes_a_second: float | None = None
        # When the buffer was full, and what was sent since.
        self._full_at: float | None = None
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<UplinkMeter {self.bytes_a_second or 0:.3g} B/s>"

    def sent(self, count: int, began: float, ended: float) -> None:
        """So many bytes were handed to the system, which took from `began` to `ended`."""
        self._bytes += count
        if ended - began < WAITED_S:
            return
        if self._full_at is not None:
            length_s = ended - self._full_at
            if self._bytes < MIN_BYTES or length_s < MIN_S:
                return
            self.bytes_a_second = self._bytes / length_s
        self._full_at, self._bytes = ended, 0

    def idle(self) -> None:
        """There is nothing to send: the buffer runs empty."""
        self._full_at = None

"""Measures how many bytes a second a line takes, from the moments when its socket makes us wait.

The time is an argument. The system's own buffer takes megabytes at once, which shows nothing about the line. But a send
that had to wait has just filled the buffer: between two such moments the line took as many bytes at its other end as we
put in at ours.
"""

from __future__ import annotations

# A send that takes this long was waiting for the line, and not for its turn among our own tasks.
WAITED_S = 0.002
# Buffers grow while they are in use, to 4 MiB on Linux. With this minimum, that growth accounts for half of the bytes
# at most.
MIN_BYTES = 8 * 1024 * 1024
MIN_S = 0.25


class UplinkMeter:
    """The meter of one connection. `bytes_a_second` is the last measurement; None before the first."""

    def __init__(self) -> None:
        self.bytes_a_second: float | None = None
        # When the buffer was full, and how much was sent since.
        self._full_at: float | None = None
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<UplinkMeter {self.bytes_a_second or 0:.3g} B/s>"

    def sent(self, count: int, began: float, ended: float) -> None:
        """Note that `count` bytes were given to the system, in a call from `began` to `ended`."""
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
        """Note that there is nothing to send: the buffer runs empty."""
        self._full_at = None

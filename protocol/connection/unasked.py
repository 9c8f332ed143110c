"""Limits frames that cost the receiver work and give the sender nothing: PINGs without pause, and credit for nothing.

A frame costs us 0.05 ms to take in, whatever it says. A peer that sends a thousand PINGs a second would fill a
twentieth of a processor with one connection.
"""

from __future__ import annotations

from typing import Final

from peerd.protocol.errors import RemoteProtocolError

# One PING is under way at a time, so a peer sends as many as its callers measure in one round trip after the other.
PINGS_AT_ONCE: Final = 64
PINGS_A_SECOND: Final = 8.0
# Credit is given for bytes that were read. A DATA frame can hold many messages, of which each may be read alone; but
# no credit is due before a good part of the window was read.
CREDITS_AT_ONCE: Final = 64
CREDITS_A_DATA_FRAME: Final = 4
MOST_CREDITS: Final = 4096


class PingRate:
    """Counts a peer's PINGs. `now` is the time in seconds at which the connection began."""

    __slots__ = ("_at", "_left")

    def __init__(self, now: float) -> None:
        self._left = float(PINGS_AT_ONCE)
        self._at = now

    def note(self, now: float) -> None:
        """Note a PING of the peer. Raises RemoteProtocolError for one too many."""
        self._left = min(self._left + (now - self._at) * PINGS_A_SECOND, PINGS_AT_ONCE) - 1
        self._at = now
        if self._left < 0:
            raise RemoteProtocolError("the peer sends PINGs without pause")


class CreditRate:
    """Counts a peer's CREDITs beside the DATA that it was sent."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = CREDITS_AT_ONCE

    def sent_data(self) -> None:
        """Note that we sent the peer a DATA frame, for which it may give credit."""
        self._left = min(self._left + CREDITS_A_DATA_FRAME, MOST_CREDITS)

    def note(self) -> None:
        """Note a CREDIT of the peer. Raises RemoteProtocolError for one too many."""
        self._left -= 1
        if self._left < 0:
            raise RemoteProtocolError("the peer gives credit again and again for what it was not sent")

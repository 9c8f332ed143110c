"""Whether the other side is still there, told by our own PINGs.

Knows when something was last received; knows no frames but the token that a PONG must echo. A connection
that is half open says nothing, ever: so after some silence we ask, and after more we stop waiting. The
difficulty is our own sleep (a suspended laptop, a starved loop): who wakes late must not blame the peer
for a silence that it was not awake to hear.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from peerd.protocol.errors import ConnectionLost
from peerd.protocol.frames import Pong

_TOKEN = struct.Struct(">Q")
# A timer that fires this late says that we slept.
_OVERSLEPT_S = 1.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connection may be silent.

    handshake_s: from the first byte until both sides are proven.
    ping_after_s: silence after which we ask whether the peer is there.
    dead_after_s: silence after which it is not.
    """

    handshake_s: float = 10.0
    ping_after_s: float = 5.0
    dead_after_s: float = 10.0


class Liveness:
    """Counts silence from `now` on. Asks at once, to learn the round-trip time."""

    def __init__(self, patience: Patience, now: float) -> None:
        self._patience = patience
        self._heard = now
        self._token = 0
        self._asked: float | None = None
        # Whether the present silence has lasted long enough to be asked about.
        self._doubting = False
        self.ping_due = True
        """Whether a PING should go out as soon as possible."""
        self.rtt_s: float | None = None
        """The last measured round trip, None before the first."""
        self.answers = 0
        """PINGs that were answered."""
        self.best_rtt_s: float | None = None
        """The shortest: what the line itself takes, without anybody's queues."""

    @property
    def deadline(self) -> float:
        """When `check` has something to do. It only ever moves later."""
        return self._heard + (self._patience.dead_after_s if self._doubting else self._patience.ping_after_s)

    def heard(self, now: float) -> None:
        """Something authentic arrived."""
        self._heard = now
        self._doubting = False

    def ping(self, now: float) -> bytes:
        """The token of the PING that leaves now."""
        self.ping_due = False
        self._asked = now
        self._token += 1
        return _TOKEN.pack(self._token)

    def pong(self, frame: Pong, now: float) -> None:
        """Take an answer; one that we did not ask for proves nothing and is ignored."""
        if self._asked is not None and frame.token == _TOKEN.pack(self._token):
            self.rtt_s = now - self._asked
            self.best_rtt_s = self.rtt_s if self.best_rtt_s is None else min(self.best_rtt_s, self.rtt_s)
            self._asked = None
            self.answers += 1

    def check(self, now: float) -> None:
        """Ask, or raise ConnectionLost, as the time demands."""
        if now < self.deadline:
            return
        silent_s = now - self._heard
        if now - self.deadline > _OVERSLEPT_S:
            self._heard = now - self._patience.ping_after_s
        elif self._doubting:
            raise ConnectionLost(f"the peer has been silent for {silent_s:.1f} s")
        self._doubting = True
        if self._asked is None:
            self.ping_due = True

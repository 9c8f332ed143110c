"""Decides whether the peer is still there, from our own PINGs and from what the operating system knows of sent bytes.

A half-open connection stays silent for ever. So after some silence we send a PING, sooner while streams are open. A
peer that is merely slow must not be declared dead. Silence has three causes that look alike: the path is broken, the
peer's process is busy or stopped, or we ourselves did not listen (a suspended laptop, a starved event loop). The
first two differ in that the system of a reachable host acknowledges bytes, however busy its processes are; the third
shows in our own late timers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from peerd.protocol.connection.frames import PongFrame
from peerd.protocol.errors import ConnectionLost, Unresponsive

_TOKEN = struct.Struct(">Q")
# A timer that fires this many seconds late shows that our own process did not run.
_OVERSLEPT_S = 1.0
# In doubt, we check again this often. A verdict needs two checks that were on time, so that bytes which arrived while
# we were held up have been read by then.
_LOOK_S = 0.5
# Repetitions in a row that the far system left unanswered. RFC 6298 doubles its time-out each time, starting from the
# measured round trip: three take 1.4 s on a short line, more on a long one; 5 % of loss causes three in 1 of 8000
# cases.
_UNANSWERED = 3


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a connection may be silent, in seconds.

    handshake_s: from the first byte until both sides are proven.
    ask_after_s: silence after which we PING the peer.
    ask_in_use_s: silence after which we PING while streams are open, since a caller may wait for an answer.
    ask_again_s: time from an answer to the next PING, even if the peer keeps sending: the round trip changes, and a
        peer that never reads must be noticed.
    undelivered_s: how long after our PING the far system may acknowledge nothing.
    untold_s: silence while streams are open, if the transport cannot tell what was acknowledged. A serving peer's loop
        stands still for up to 0.2 s while it loads a model, and for 0.8 s with three programs to a processor beside it.
    dead_after_s: silence in every other case: the far system is there, but the peer's process does not answer.
    unread_s: how long a PING may stay unanswered while the peer sends. A slow line's buffers can hold it up for 10 s.
    """

    handshake_s: float = 10.0
    ask_after_s: float = 5.0
    ask_in_use_s: float = 1.0
    ask_again_s: float = 10.0
    undelivered_s: float = 1.0
    untold_s: float = 5.0
    dead_after_s: float = 10.0
    unread_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What our operating system knows of the bytes that we sent.

    acknowledged_bytes: how many bytes the far system has acknowledged.
    unanswered: how many times in a row our system retransmitted or probed for room and got no acknowledgement at all.
    """

    acknowledged_bytes: int
    unanswered: int


class Liveness:
    """Measures the peer's silence from `now` on. Sends a PING at once, to learn the round-trip time."""

    def __init__(self, timeouts: Timeouts, now: float) -> None:
        self._timeouts = timeouts
        # Silence counts from here: bytes arrived, the far system took bytes, or our process woke.
        self._quiet_since = now
        self._token = 0
        # Since when an answer is due; the PING itself may not have been sent yet.
        self._asked: float | None = now
        self._left = now
        self._answered = now
        # Whether the present silence has lasted long enough that we asked about it.
        self._doubting = False
        self._looked = now
        self._acknowledged_bytes = 0
        self.ping_due = True
        """Whether a PING should go out as soon as possible."""
        self.rtt_s: float | None = None
        """The last measured round trip, None before the first."""
        self.answers = 0
        """PINGs that were answered."""
        self.best_rtt_s: float | None = None
        """The shortest round trip: what the line itself takes, without queues."""

    def deadline(self, *, in_use: bool) -> float:
        """When `check` must run next. It moves to an earlier time only when the first stream opens."""
        if self._doubting:
            return self._looked + _LOOK_S
        asks = self._quiet_since + self._ask_after_s(in_use)
        if self._asked is None:
            return min(asks, self._answered + self._timeouts.ask_again_s)
        return min(asks, self._asked + self._timeouts.unread_s)

    def heard(self, now: float) -> None:
        """An authentic message arrived."""
        self._quiet_since = now
        self._doubting = False

    def ask(self, now: float) -> None:
        """Send a PING unless one is under way: a connection loses nothing, so a second PING would tell us no more."""
        if self._asked is None:
            self._asked = now
            self.ping_due = True

    def ping(self, now: float) -> bytes:
        """The token of the PING that is sent now."""
        self.ping_due = False
        self._left = now
        self._token += 1
        return _TOKEN.pack(self._token)

    def pong(self, frame: PongFrame, now: float) -> None:
        """Take an answer. Ignores one that we did not ask for, since it proves nothing."""
        if self._asked is not None and not self.ping_due and frame.token == _TOKEN.pack(self._token):
            self.rtt_s = now - self._left
            self.best_rtt_s = self.rtt_s if self.best_rtt_s is None else min(self.best_rtt_s, self.rtt_s)
            self._asked = None
            self.answers += 1
            self._answered = now

    def check(self, now: float, *, in_use: bool = False, delivery: Delivery | None = None) -> None:
        """Ask, or raise ConnectionLost or Unresponsive, as the time demands.

        in_use: whether streams are open. delivery: None if the transport cannot tell.
        """
        late_s = now - self.deadline(in_use=in_use)
        if late_s < 0:
            return
        self._looked = now
        ask_after_s = self._ask_after_s(in_use)
        if late_s > _OVERSLEPT_S:
            self._quiet_since = max(self._quiet_since, now - ask_after_s)
            self._asked = None if self._asked is None else now
            self._doubting = False
        taken = self._note_taken(delivery)
        if self._asked is not None and now >= self._asked + self._timeouts.unread_s:
            age_s = now - self._asked
            raise Unresponsive(f"the peer talks but does not read: a PING of {age_s:.0f} s ago is unanswered")
        if self._doubting:
            if taken:
                # A slow line, full of bytes that we send: our PING is still queued among them.
                self._quiet_since = now - ask_after_s
            self._judge(now - self._quiet_since, in_use, delivery)
        elif now >= self._quiet_since + ask_after_s:
            self._doubting = True
        self.ask(now)

    def _judge(self, silent_s: float, in_use: bool, delivery: Delivery | None) -> None:
        timeouts = self._timeouts
        if delivery is None:
            untold_s = max(timeouts.untold_s, self._ask_after_s(in_use) + 8 * (self.rtt_s or 0.0))
            gone = in_use and silent_s >= untold_s
        else:
            waited_s = self._ask_after_s(in_use) + timeouts.undelivered_s
            gone = delivery.unanswered >= _UNANSWERED and silent_s >= waited_s
        if gone or silent_s >= timeouts.dead_after_s:
            what = "nothing we send arrives, and " if delivery and delivery.unanswered >= _UNANSWERED else ""
            raise ConnectionLost(f"{what}the peer has been silent for {silent_s:.1f} s")

    def _note_taken(self, delivery: Delivery | None) -> bool:
        """Whether the far system acknowledged more of our bytes since the last check."""
        if delivery is None:
            return False
        before, self._acknowledged_bytes = self._acknowledged_bytes, delivery.acknowledged_bytes
        return delivery.acknowledged_bytes > before

    def _ask_after_s(self, in_use: bool) -> float:
        return self._timeouts.ask_in_use_s if in_use else self._timeouts.ask_after_s

"""Whether the other side is still there, told by our own PINGs and by what the system knows of our bytes.

Knows when something was last received and what became of what we sent; knows no frames but the token that a
PONG must echo. A connection that is half open says nothing, ever: so after some silence we ask, sooner where
somebody waits for an answer. The difficulty is to blame nobody who is merely slow. Silence has three
reasons that look alike from here: the way is gone, the peer's process is busy (it loads a model, it was stopped),
or we ourselves did not listen (a suspended laptop, a starved loop). The first can be told from the second, for a host
that is there acknowledges what it gets, however busy its processes are; the third shows in our own late timers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from peerd.protocol.connection.frames import Pong
from peerd.protocol.errors import ConnectionLost, Unresponsive

_TOKEN = struct.Struct(">Q")
# A timer that fires this late says that we slept.
_OVERSLEPT_S = 1.0
# In doubt, we look again this often: a verdict needs two looks that were on time, so that what arrived while
# we were held up has been read by then.
_LOOK_S = 0.5
# Repetitions in a row that the far system left unanswered. RFC 6298 doubles its time-out each time, and starts
# from the measured round trip: 1.4 s on a short line, more on a long one; 5 % of loss does that to one in 8000.
_UNANSWERED = 3


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connection may be silent.

    handshake_s: from the first byte until both sides are proven.
    ask_after_s: silence after which we ask whether the peer is there.
    ask_in_use_s: the same while streams are open: somebody may wait for an answer.
    ask_again_s: after an answer we ask anew, however much the peer says: the round trip changes, and who never reads
        must be found out.
    undelivered_s: after we asked, where the far system acknowledges nothing.
    untold_s: silence in use, where nobody can tell what was acknowledged. A serving peer's loop stands still
        for up to 0.2 s while it loads a model, and for 0.8 s with three programs to a processor beside it.
    dead_after_s: silence in every other case: the far system is there, the peer's process does not answer.
    unread_s: a PING without answer while the peer goes on talking. A slow line's buffers hold it up for 10 s.
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
    """What our system knows of the bytes that we sent, where it knows anything.

    acknowledged_bytes: so many the far system has.
    unanswered: times in a row that ours sent something again, or asked for room, and got no acknowledgement at all.
    """

    acknowledged_bytes: int
    unanswered: int


class Liveness:
    """Counts silence from `now` on. Asks at once, to learn the round-trip time."""

    def __init__(self, patience: Patience, now: float) -> None:
        self._patience = patience
        # Silence counts from here: something was heard, or taken by the far system, or we woke.
        self._quiet_since = now
        self._token = 0
        # Since when an answer is due; the PING may not have left yet.
        self._asked: float | None = now
        self._left = now
        self._answered = now
        # Whether the present silence has lasted long enough to be asked about.
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
        """The shortest: what the line itself takes, without anybody's queues."""

    def deadline(self, *, in_use: bool) -> float:
        """When `check` has something to do. It only ever moves later, but where the connection comes into use."""
        if self._doubting:
            return self._looked + _LOOK_S
        asks = self._quiet_since + self._ask_after_s(in_use)
        if self._asked is None:
            return min(asks, self._answered + self._patience.ask_again_s)
        return min(asks, self._asked + self._patience.unread_s)

    def heard(self, now: float) -> None:
        """Something authentic arrived."""
        self._quiet_since = now
        self._doubting = False

    def ask(self, now: float) -> None:
        """Let a PING go out, unless one is under way: nothing is lost on a connection, so another would say no more."""
        if self._asked is None:
            self._asked = now
            self.ping_due = True

    def ping(self, now: float) -> bytes:
        """The token of the PING that leaves now."""
        self.ping_due = False
        self._left = now
        self._token += 1
        return _TOKEN.pack(self._token)

    def pong(self, frame: Pong, now: float) -> None:
        """Take an answer; one that we did not ask for proves nothing and is ignored."""
        if self._asked is not None and not self.ping_due and frame.token == _TOKEN.pack(self._token):
            self.rtt_s = now - self._left
            self.best_rtt_s = self.rtt_s if self.best_rtt_s is None else min(self.best_rtt_s, self.rtt_s)
            self._asked = None
            self.answers += 1
            self._answered = now

    def check(self, now: float, *, in_use: bool = False, delivery: Delivery | None = None) -> None:
        """Ask, or raise ConnectionLost or Unresponsive, as the time demands.

        in_use: whether streams are open. delivery: None where nobody can tell.
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
        if self._asked is not None and now >= self._asked + self._patience.unread_s:
            age_s = now - self._asked
            raise Unresponsive(f"the peer talks but does not read: a PING of {age_s:.0f} s ago is unanswered")
        if self._doubting:
            if taken:
                # A slow line, full of what we send: the PING is still in the middle of it.
                self._quiet_since = now - ask_after_s
            self._judge(now - self._quiet_since, in_use, delivery)
        elif now >= self._quiet_since + ask_after_s:
            self._doubting = True
        self.ask(now)

    def _judge(self, silent_s: float, in_use: bool, delivery: Delivery | None) -> None:
        patience = self._patience
        if delivery is None:
            untold_s = max(patience.untold_s, self._ask_after_s(in_use) + 8 * (self.rtt_s or 0.0))
            gone = in_use and silent_s >= untold_s
        else:
            waited_s = self._ask_after_s(in_use) + patience.undelivered_s
            gone = delivery.unanswered >= _UNANSWERED and silent_s >= waited_s
        if gone or silent_s >= patience.dead_after_s:
            what = "nothing we send arrives, and " if delivery and delivery.unanswered >= _UNANSWERED else ""
            raise ConnectionLost(f"{what}the peer has been silent for {silent_s:.1f} s")

    def _note_taken(self, delivery: Delivery | None) -> bool:
        """Whether the far system took more of what we sent since the last look."""
        if delivery is None:
            return False
        before, self._acknowledged_bytes = self._acknowledged_bytes, delivery.acknowledged_bytes
        return delivery.acknowledged_bytes > before

    def _ask_after_s(self, in_use: bool) -> float:
        return self._patience.ask_in_use_s if in_use else self._patience.ask_after_s

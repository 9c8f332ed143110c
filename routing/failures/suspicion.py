"""Finds the hop that is to blame for a late step, from what each hop reports about its progress.

A frozen process does not answer. A wedged device answers every question and ends no turn. A busy device ends turns,
but none of ours. A link that loses what it is given leaves the hops at both its ends idle. A hop that lies says that it
is done, or that nothing came: it stands out as the place behind which nothing happens. This file only judges: the
caller asks the hops and replaces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peerd.protocol.messages.session import Progress

# A device that ends turns will come to ours: its queue may take this many times as long as the step should.
BUSY_FACTOR = 8
# A chain that never answered us a step may still compute its first: a prompt's piece takes a minute on a slow machine.
UNKNOWN_HOLD_S = 60.0


@dataclass(frozen=True, slots=True)
class Hung:
    """These hops, given by index in the chain, do not make progress."""

    hops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stuck:
    """The results that this hop sends do not arrive at the next hop."""

    upstream: int


Finding = Hung | Stuck


@dataclass(frozen=True, slots=True)
class _Seen:
    """Where the step is, since when, and how many turns the device had ended when it was first seen there.

    hop: -1 where it is on its way to the first.
    """

    hop: int
    is_held: bool
    since: float
    turns: int


class Suspicion:
    """Watches one step with number `seq`, which could begin at time `since`."""

    def __init__(self, seq: int, since: float) -> None:
        self.seq = seq
        self._since = since
        self._seen: _Seen | None = None

    def look(self, reports: Sequence[Progress | None], now: float, expected_s: float | None) -> Finding | None:
        """What to do about the step; None if it is too early to say.

        reports: what each hop reports, in order; None if it did not answer.
        expected_s: how long the step should take; None if nothing is known about the chain.
        """
        silent = tuple(index for index, report in enumerate(reports) if report is None)
        if silent:
            return Hung(silent)
        seen = self._where([report for report in reports if report is not None], now)
        before = self._seen
        if before is None or (before.hop, before.is_held) != (seen.hop, seen.is_held):
            self._seen = before = seen
        return self._finding(before, seen, len(reports), now, expected_s)

    def _where(self, reports: Sequence[Progress], now: float) -> _Seen:
        """Where the step is: the first hop that holds it, or the last hop that it has left."""
        for index, report in enumerate(reports):
            if report.taken < self.seq:
                return _Seen(index - 1, False, now, 0)
            if report.done < self.seq:
                return _Seen(index, True, now, report.turns)
        return _Seen(len(reports) - 1, False, now, 0)

    def _finding(self, before: _Seen, seen: _Seen, hops: int, now: float, expected_s: float | None) -> Finding | None:
        at_rest_s = now - before.since
        if not seen.is_held and seen.hop < 0:
            # On its way from us, over a line that may be slow; or the first hop denies that it came.
            return Hung((0,)) if at_rest_s >= BUSY_FACTOR * (expected_s or UNKNOWN_HOLD_S / BUSY_FACTOR) else None
        if not seen.is_held:
            is_late = at_rest_s >= (expected_s or UNKNOWN_HOLD_S) / 2
            # Behind the last hop is only our own line.
            return (Stuck(seen.hop) if seen.hop < hops - 1 else Hung((seen.hop,))) if is_late else None
        if expected_s is None:
            return Hung((seen.hop,)) if now - self._since >= UNKNOWN_HOLD_S else None
        is_busy = seen.turns > before.turns
        if is_busy:
            return Hung((seen.hop,)) if now - self._since >= BUSY_FACTOR * expected_s else None
        return Hung((seen.hop,)) if at_rest_s >= expected_s / 2 else None

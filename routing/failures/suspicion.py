"""Which hop is to blame for a step that is late, by what each hop says of it.

Knows what hops report and when; asks nobody and replaces nobody. The difficulty is telling the hung from the
busy: a frozen process says nothing, a wedged device answers every question and ends no turn, a busy one ends
turns, though none of ours; and a link that swallows what it is given leaves both its ends at rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peerd.protocol.messages.session import Progress

# A device that ends turns will come to ours: so many times as long as a step should take may its queue be.
BUSY_FACTOR = 8
# Who never answered us a step may be computing its first: a prompt's piece takes a minute on a slow machine.
UNKNOWN_HOLD_S = 60.0


@dataclass(frozen=True, slots=True)
class Hung:
    """These hops, by their place in the chain, do not do what they should."""

    hops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stuck:
    """What this hop sends does not arrive at the next."""

    upstream: int


Finding = Hung | Stuck


@dataclass(frozen=True, slots=True)
class _Seen:
    """Where the step was, first seen there at a time, when the device had ended so many turns."""

    hop: int
    is_held: bool
    since: float
    turns: int


class Suspicion:
    """Of one step, numbered `seq`, which could be begun at `since`."""

    def __init__(self, seq: int, since: float) -> None:
        self.seq = seq
        self._since = since
        self._seen: _Seen | None = None

    def look(self, reports: Sequence[Progress | None], now: float, expected_s: float | None) -> Finding | None:
        """What to act on, if anything yet. `reports`: what each hop says, in order; None is silence.

        expected_s: what the step should take; None where nothing is known of the chain.
        """
        silent = tuple(index for index, report in enumerate(reports) if report is None)
        if silent:
            return Hung(silent)
        seen = self._where([report for report in reports if report is not None], now)
        if seen is None:
            self._seen = None
            return None
        before = self._seen
        if before is None or (before.hop, before.is_held) != (seen.hop, seen.is_held):
            self._seen = before = seen
        return self._finding(before, seen, now, expected_s)

    def _where(self, reports: Sequence[Progress], now: float) -> _Seen | None:
        """The first hop that holds the step, or the first that it has not come to."""
        for index, report in enumerate(reports):
            if report.taken < self.seq:
                # What has not come to the first hop is on its way from us.
                return _Seen(index - 1, False, now, 0) if index else None
            if report.done < self.seq:
                return _Seen(index, True, now, report.turns)
        return None

    def _finding(self, before: _Seen, seen: _Seen, now: float, expected_s: float | None) -> Finding | None:
        at_rest_s = now - before.since
        if not seen.is_held:
            return Stuck(seen.hop) if at_rest_s >= (expected_s or UNKNOWN_HOLD_S) / 2 else None
        if expected_s is None:
            return Hung((seen.hop,)) if now - self._since >= UNKNOWN_HOLD_S else None
        is_busy = seen.turns > before.turns
        if is_busy:
            return Hung((seen.hop,)) if now - self._since >= BUSY_FACTOR * expected_s else None
        return Hung((seen.hop,)) if at_rest_s >= expected_s / 2 else None

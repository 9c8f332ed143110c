"""Keeps a score of what each peer and each address did wrong lately, and bans those whose score is too high.

A score falls steadily, so an honest peer with a bug, or one behind a broken line, is let in again by itself. An address
is scored beside the peer, because keys cost nothing. Private and unknown addresses are not scored: a proxy may stand in
front of many peers there.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Final

from peerd.net.limits.gate import host_of
from peerd.protocol.addresses import IpAddress
from peerd.protocol.identity import PeerId

log = logging.getLogger(__name__)

# A score beyond this is a ban.
LIMIT: Final = 100.0
BANNED_S: Final = 600.0
# An exception of ours that the peer caused: three within a minute are a ban.
BUG: Final = 50.0
# Streams or requests so fast that the connection was closed: three within a minute are a ban.
FLOOD: Final = 50.0
# Bytes that break the protocol of a connection: eleven at once, or six a minute for long, are a ban.
MALFORMED: Final = 10.0
FALLS_A_SECOND: Final = 50.0 / 60
# How many peers and addresses are remembered. Keys cost nothing, so the list is bounded; those that did nothing wrong
# for longest are forgotten first.
MAX_REMEMBERED: Final = 4096


@dataclass(slots=True)
class _Entry:
    points: float = 0.0
    at_s: float = 0.0
    banned_until_s: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def points_at(self, now: float) -> float:
        return max(0.0, self.points - (now - self.at_s) * FALLS_A_SECOND)


@dataclass(frozen=True, slots=True)
class Score:
    """What one peer or address did wrong lately, for status displays.

    name: a PeerId, or a public address (of IPv6 its /64).
    points: its score now; beyond 100 it was banned. banned_s: seconds until the ban ends, 0 for none.
    reasons: how often it did what.
    """

    name: str
    points: float
    banned_s: float
    reasons: dict[str, int]


class Scores:
    """The scores of one process."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Scores of {len(self._entries)}>"

    def note(self, reason: str, points: float, peer_id: PeerId | None, ip: IpAddress | None, now: float) -> None:
        """Add `points` to the scores of the peer and of its address, as far as they are known."""
        for name in _names(peer_id, ip):
            entry = self._entries.setdefault(name, _Entry())
            self._entries.move_to_end(name)
            entry.points, entry.at_s = entry.points_at(now) + points, now
            entry.reasons[reason] += 1
            if entry.points > LIMIT and entry.banned_until_s <= now:
                entry.banned_until_s = now + BANNED_S
                log.warning("refusing %s for %g minutes: %s", name, BANNED_S / 60, _listed(entry.reasons))
        while len(self._entries) > MAX_REMEMBERED:
            self._entries.popitem(last=False)

    def is_banned(self, peer_id: PeerId | None, ip: IpAddress | None, now: float) -> bool:
        """Whether the peer or its address is banned."""
        found = (self._entries.get(name) for name in _names(peer_id, ip))
        return any(entry is not None and entry.banned_until_s > now for entry in found)

    def listed(self, now: float) -> list[Score]:
        """Every peer and address with a score or a ban now, the worst first."""
        scores = [
            Score(name, entry.points_at(now), max(0.0, entry.banned_until_s - now), dict(entry.reasons))
            for name, entry in self._entries.items()
        ]
        current = [score for score in scores if score.points or score.banned_s]
        return sorted(current, key=lambda score: (score.banned_s, score.points), reverse=True)


def _names(peer_id: PeerId | None, ip: IpAddress | None) -> list[str]:
    return [name for name in (str(peer_id or ""), host_of(ip)) if name]


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} ({count}x)" for reason, count in reasons.most_common())

"""What time it is for the swarm: our clock, corrected by what other peers' clocks say.

Knows the times that it is told; asks nobody. The difficulty is whom to believe: records live for a minute,
so a clock that is minutes wrong makes a peer invisible, but no single peer may turn ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from statistics import median

from peerd.protocol.identity import PeerId

log = logging.getLogger(__name__)

# Two others and our own clock outvote one that lies.
MIN_PEERS = 2
# Of the peers met last.
MAX_PEERS = 64
# Identities are free: whoever makes up enough of them turns our clock no further than this.
MAX_CORRECTION_S = 600.0
# Beyond this somebody should set the machine's clock: for skews up to 60 s, records are still taken.
WARN_S = 30.0


class SwarmClock:
    """Unix seconds, corrected by the median of the offsets seen. `system` gives the machine's."""

    def __init__(self, system: Callable[[], float]) -> None:
        self._system = system
        self._offsets_s: dict[PeerId, float] = {}
        self._warned = False
        self.correction_s = 0.0

    def system(self) -> float:
        """What the machine's own clock shows."""
        return self._system()

    def __call__(self) -> float:
        """Now."""
        return self._system() + self.correction_s

    def observed(self, peer_id: PeerId, unix_s: float) -> None:
        """A peer's clock shows `unix_s` now."""
        self._offsets_s.pop(peer_id, None)
        self._offsets_s[peer_id] = unix_s - self._system()
        if len(self._offsets_s) > MAX_PEERS:
            del self._offsets_s[next(iter(self._offsets_s))]
        if len(self._offsets_s) >= MIN_PEERS:
            offset_s = median([0.0, *self._offsets_s.values()])
            self.correction_s = max(-MAX_CORRECTION_S, min(MAX_CORRECTION_S, offset_s))
        if abs(self.correction_s) > WARN_S and not self._warned:
            self._warned = True
            direction = "behind" if self.correction_s > 0 else "ahead of"
            log.warning("this machine's clock is %.0f s %s the swarm's", abs(self.correction_s), direction)

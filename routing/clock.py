"""The swarm's time: our own clock, corrected by the median of what other peers' clocks say.

Records live for a minute, so a clock that is minutes wrong would make a peer invisible. But no single peer may turn
our clock, and no group of peers may turn it far.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from statistics import median

from peerd.protocol.identity import PeerId

log = logging.getLogger(__name__)

# Two other clocks and our own outvote one that is wrong.
MIN_PEERS = 2
# The clocks of the peers met last count.
MAX_PEERS = 64
# Identities cost nothing, so an attacker can make up many; they cannot turn our clock further than this.
MAX_CORRECTION_S = 600.0
# Beyond this the operator should set the machine's clock. For skews up to 60 s, peers still accept our records.
WARN_S = 30.0


class SwarmClock:
    """Unix seconds, corrected by the median of the offsets seen. `system` returns the machine's unix seconds."""

    def __init__(self, system: Callable[[], float]) -> None:
        self._system = system
        self._offsets_s: dict[PeerId, float] = {}
        self._warned = False
        self.correction_s = 0.0

    def system(self) -> float:
        """The machine's own clock, uncorrected."""
        return self._system()

    def __call__(self) -> float:
        """The corrected time in unix seconds."""
        return self._system() + self.correction_s

    def observed(self, peer_id: PeerId, unix_s: float) -> None:
        """Note that a peer's clock shows `unix_s` now."""
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

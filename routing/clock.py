"""The swarm's time: our own clock, corrected by the median of the other peers' clocks.

Records live for a minute, so a clock that is minutes wrong makes a peer invisible. But no single peer may turn our
clock, and no group of peers may turn it far. So all peers of one network count as one; a clock that the system keeps
right is believed more than peers; and only many networks that agree can turn a clock by more than ten minutes. If an
error is not corrected, a warning says what to do.
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
# A clock that the system keeps right is wrong by seconds at most. A larger difference is a lie, or a broken time
# server.
MAX_CORRECTION_OF_KEPT_S = 60.0
# This many networks, if four fifths of all agree within AGREEMENT_S, may turn a clock further: a clock that was never
# set, or whose battery is empty, is hours or years wrong. An attacker that controls all of these networks around us
# also controls what we see of the swarm.
MIN_NETWORKS_TO_SET = 5
AGREEMENT_S = 30.0
# Beyond this the operator should set the machine's clock. For skews up to 60 s, peers still accept our records.
WARN_S = 30.0


def duration(seconds: float) -> str:
    """A length of time for people: `90 s`, `20 min`, `3 h`, `5 d`."""
    seconds = abs(seconds)
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        # Clocks that people set wrongly are mostly wrong by whole hours.
        if seconds >= (2 * unit if name == "min" else 0.99 * unit):
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


class SwarmClock:
    """Unix seconds, corrected by the median of the offsets seen.

    system: returns the machine's unix seconds. is_kept: returns whether the system keeps its clock right (NTP).
    """

    def __init__(self, system: Callable[[], float], is_kept: Callable[[], bool] = lambda: False) -> None:
        self._system = system
        self._is_kept = is_kept
        # The offsets by network, or by peer if its address counts as no network; and which keys are networks.
        self._offsets_s: dict[str, float] = {}
        self._networks: set[str] = set()
        self._warned_of = ""
        self.correction_s = 0.0

    def system(self) -> float:
        """The machine's own clock, uncorrected."""
        return self._system()

    def __call__(self) -> float:
        """The corrected time in unix seconds."""
        return self._system() + self.correction_s

    def observed(self, peer_id: PeerId, unix_s: float, network: str = "") -> None:
        """Note that a peer's clock shows `unix_s` now. `network`: the peer's public network, or "" if it has none."""
        witness = network or peer_id
        self._offsets_s.pop(witness, None)
        self._offsets_s[witness] = unix_s - self._system()
        if network:
            self._networks.add(network)
        if len(self._offsets_s) > MAX_PEERS:
            oldest = next(iter(self._offsets_s))
            del self._offsets_s[oldest]
            self._networks.discard(oldest)
        offset_s = median([0.0, *self._offsets_s.values()])
        if len(self._offsets_s) >= MIN_PEERS:
            limit_s = self._limit_s()
            self.correction_s = max(-limit_s, min(limit_s, offset_s))
        self._warn(peer_id)

    def _limit_s(self) -> float:
        """How far the peers may turn our clock."""
        if self._is_kept():
            return MAX_CORRECTION_OF_KEPT_S
        heard = [self._offsets_s[network] for network in self._networks]
        if len(heard) < MIN_NETWORKS_TO_SET:
            return MAX_CORRECTION_S
        middle = median(heard)
        agreeing = sum(abs(offset - middle) <= AGREEMENT_S for offset in heard)
        return abs(middle) + AGREEMENT_S if agreeing >= max(MIN_NETWORKS_TO_SET, 0.8 * len(heard)) else MAX_CORRECTION_S

    def _warn(self, peer_id: PeerId) -> None:
        """Warn about a wrong clock and its consequences, whenever these have changed."""
        offset_s = median(self._offsets_s.values())
        if abs(offset_s) <= WARN_S:
            return
        which = f"{duration(offset_s)} {'behind' if offset_s > 0 else 'ahead of'}"
        if len(self._offsets_s) < MIN_PEERS:
            kind = "one"
            warning = (
                f"this machine's clock is {which} that of {peer_id}, the only peer that says what time it is: one of"
                " them is wrong, and each may not see what the other announces; set it (NTP)"
            )
        elif abs(offset_s - self.correction_s) <= WARN_S:
            kind = "corrected"
            warning = f"this machine's clock is {which} the swarm's, which peerd makes up for: set it (NTP)"
        elif abs(self.correction_s) <= WARN_S and len(self._offsets_s) == MIN_PEERS:
            # The two do not agree, so our own clock is in the middle.
            return
        else:
            kind = "beyond"
            warning = (
                f"this machine's clock is {which} the swarm's, more than peerd may make up for: others do not see what"
                " this peer announces, nor it what they do; set it (NTP)"
            )
        if kind != self._warned_of:
            self._warned_of = kind
            log.warning("%s", warning)

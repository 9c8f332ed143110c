"""Limits what peers claim of their speed by what others claim and by what was seen.

A stranger that claims a million times the speed of all others would be in every chain. So a claim is believed up to
what nine in ten of the others claim, the fastest of them left out; and beyond that as far as the peer has shown it in
our own sessions. All peers of one public network are one voice, for keys cost nothing. Where we have reached some
peers, the claims of peers that we have not reached set no limit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from peerd.protocol.identity import PeerId
from peerd.routing.directory.standing import StandingOf

QUANTILE = 0.9
# Among fewer others there is nobody to compare with: one of three servers may well be a hundred times as fast.
LEAST_OTHERS = 3


def believed(
    claims: Sequence[tuple[PeerId, float]], standing: StandingOf, proven: Mapping[PeerId, float] | None = None
) -> list[float]:
    """The throughput that each claim stands for; 0, which says that it was never measured, stays 0.

    proven: for some peers, the least throughput that they must have had in our sessions.
    """
    known = {peer: standing(peer) for peer, _ in claims}
    voices: dict[str, list[float]] = {}
    trusted: dict[str, list[float]] = {}
    for peer, claim in claims:
        if claim:
            one = known[peer]
            voices.setdefault(one.voice, []).append(claim)
            if one.is_reached or one.has_served:
                trusted.setdefault(one.voice, []).append(claim)
    # A client that has reached few servers compares with all: two of them would let a third claim anything.
    limits = _Limits(trusted if len(trusted) > LEAST_OTHERS else voices)
    shown = proven or {}
    return [min(claim, max(limits.without(known[peer].voice), shown.get(peer, 0.0))) for peer, claim in claims]


class _Limits:
    def __init__(self, voices: Mapping[str, Sequence[float]]) -> None:
        self._of = {voice: statistics.median(claims) for voice, claims in voices.items()}
        self._sorted = sorted(self._of.values())

    def without(self, voice: str) -> float:
        """What others than `voice` claim at most; infinite if there are too few."""
        own = self._of.get(voice)
        others = len(self._sorted) - (own is not None)
        if others < LEAST_OTHERS:
            return math.inf
        # The fastest is left out: a pair of liars must not vouch for each other.
        at = math.ceil(QUANTILE * others) - 2
        if own is not None and self._sorted[at] >= own:
            at += 1
        return self._sorted[at]

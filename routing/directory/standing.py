"""What a peer's word weighs where offers contradict each other: unknown peers do not outvote known ones.

A peer may announce itself a thousand times over without being there. So first those decide who have served our
sessions, then those that we have reached, of one public network (IPv4 /24, IPv6 /48) one voice; and only then the
unknown, without those that we could not reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peerd.protocol.identity import PeerId


@dataclass(frozen=True, slots=True)
class Standing:
    """How we know a peer. voice: its public network, or itself."""

    voice: str
    has_served: bool = False
    is_reached: bool = False
    is_absent: bool = False


StandingOf = Callable[[PeerId], Standing]
Weight = tuple[int, int, int]


def unknown(peer_id: PeerId) -> Standing:
    """The standing of a peer of which nothing is known."""
    return Standing(peer_id)


def weight_of(peers: Iterable[PeerId], standing: StandingOf) -> Weight:
    """What these peers weigh together. The greater of two weights decides."""
    known = [standing(peer) for peer in peers]
    return (
        len({one.voice for one in known if one.has_served}),
        len({one.voice for one in known if one.is_reached}),
        len({one.voice for one in known if not one.is_absent}),
    )

"""Which IP addresses others see us at: what the peers that we dialled say, as long as they are connected.

Knows who says what, and how many must agree. The difficulty is that each of them may lie or stand in the same
network as we do: so peers of one public network count once, and neighbours' views are kept apart from the internet's.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from peerd.protocol.addresses import IpAddress, is_private_ip, private_range, public_network
from peerd.protocol.identity import PeerId

# How many independent peers must agree, where there are so many.
WITNESSES = 2


@dataclass(frozen=True, slots=True)
class _View:
    witness: str
    ip: IpAddress


class ObservedIps:
    """Where we are seen. Tell it of connections that we dialled, and of their end."""

    def __init__(self) -> None:
        self._views: dict[PeerId, _View] = {}

    def __repr__(self) -> str:
        return f"<ObservedIps {', '.join(map(str, self.agreed())) or 'none'} by {len(self._views)} peers>"

    def note(self, peer_id: PeerId, at: IpAddress | None, seen: IpAddress | None) -> None:
        """A peer that we dialled `at` an address says where it sees us.

        None says nothing: a relay stands between. Nor does a private address that is seen from a public one: it is a
        proxy's, behind which that peer listens.
        """
        useless = seen is None or seen.is_unspecified or seen.is_multicast
        if at is None or seen is None or useless or (public_network(at) and is_private_ip(seen)):
            self._views.pop(peer_id, None)
        else:
            self._views[peer_id] = _View(public_network(at) or peer_id, seen)

    def forget(self, peer_id: PeerId) -> None:
        """The connection to the peer has ended."""
        self._views.pop(peer_id, None)

    def agreed(self) -> tuple[IpAddress, ...]:
        """Where we are seen, public addresses first; at most one for each family and range.

        What two independent peers say, or the one if there is only one; nothing where they are divided.
        """
        groups: dict[tuple[bool, int, str | None], dict[IpAddress, set[str]]] = defaultdict(lambda: defaultdict(set))
        for view in self._views.values():
            group = (is_private_ip(view.ip), view.ip.version, private_range(view.ip))
            groups[group][view.ip].add(view.witness)
        found = []
        for _, witnesses in sorted(groups.items(), key=lambda item: (*item[0][:2], str(item[0][2]))):
            needed = min(WITNESSES, len(set().union(*witnesses.values())))
            counts = sorted(((len(names), ip) for ip, names in witnesses.items()), key=lambda one: -one[0])
            divided = len(counts) > 1 and counts[0][0] == counts[1][0]
            if counts[0][0] >= needed and not divided:
                found.append(counts[0][1])
        return tuple(found)

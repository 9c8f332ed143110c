"""Finds the IP addresses at which other peers see us, from the reports of peers that we dialled and still hold.

A reporting peer may lie or stand in the same network as we do. So the peers of one public network count as one
witness, and private addresses (seen by neighbours) are counted apart from public ones.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from peerd.protocol.addresses import IpAddress, is_private_ip, private_range, public_network
from peerd.protocol.identity import PeerId

# How many independent peers must agree, if there are that many.
WITNESSES = 2


@dataclass(frozen=True, slots=True)
class _View:
    witness: str
    ip: IpAddress


class ObservedIps:
    """The addresses at which we are seen. Call `note` for each connection that we dialled, `forget` when it ends."""

    def __init__(self) -> None:
        self._views: dict[PeerId, _View] = {}

    def __repr__(self) -> str:
        return f"<ObservedIps {', '.join(map(str, self.agreed())) or 'none'} by {len(self._views)} peers>"

    def note(self, peer_id: PeerId, at: IpAddress | None, seen: IpAddress | None) -> None:
        """A peer that we dialled `at` an address reports that it sees us at `seen`.

        `at` or `seen` None counts as no report: a relay stands between. Nor does a private address count if we
        dialled a public one: it is the address of a proxy in front of that peer.
        """
        useless = seen is None or seen.is_unspecified or seen.is_multicast
        if at is None or seen is None or useless or (public_network(at) and is_private_ip(seen)):
            self._views.pop(peer_id, None)
        else:
            self._views[peer_id] = _View(public_network(at) or peer_id, seen)

    def forget(self, peer_id: PeerId) -> None:
        """Forget the peer's report: the connection has ended."""
        self._views.pop(peer_id, None)

    def agreed(self) -> tuple[IpAddress, ...]:
        """The addresses at which we are seen, public ones first; at most one for each IP version and range.

        An address counts if two independent peers report it, or one if there is only one. If the reports are divided
        evenly, none of them counts.
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

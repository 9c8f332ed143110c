"""The routing table of the DHT: kademlia's, without its asyncio, its clock and its mistakes.

The library does things on the side, so each override says why it is there: a full bucket pings through asyncio,
buckets read the system's clock, and the search for neighbours is not exact.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from peerd.protocol.addresses import Multiaddr, public_network
from peerd.protocol.identity import PeerId, node_id_of, public_key_of
from peerd.routing.dht.diversity import PEERS_A_NETWORK, spread

# Kademlia paper, 2.3: a bucket in which nothing was looked up for an hour is refreshed.
IDLE_BUCKET_S = 3600.0
# A contact that was silent for this long is pinged. If a third of a swarm leaves in an hour, one in 25 contacts is then
# dead; without pings, a quarter would be, and each costs a peer that asks it a second.
QUIET_S = 900.0

# A reply names 20 contacts, most of them the same as in the reply before: do not decode base58 again.
_node_id = lru_cache(maxsize=8192)(node_id_of)


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer and the addresses at which it says it can be dialled; without addresses, it is only a DHT client."""

    peer_id: PeerId
    addresses: tuple[Multiaddr, ...] = ()


class PeerNode(Node):  # type: ignore[misc]  # kademlia publishes no types
    """A contact at its position in the DHT. Raises ValueError for a malformed PeerId.

    network: the public network in which it counts: where it was found, or else that of its named addresses; "" for
        none.
    """

    def __init__(self, contact: Contact, network: str | None = None) -> None:
        super().__init__(_node_id(contact.peer_id))
        self.contact = contact
        if network is None:
            ips = [address.ip for address in contact.addresses if address.ip is not None]
            network = next(filter(None, map(public_network, ips)), "")
        self.network = network

    @cached_property
    def address_texts(self) -> tuple[str, ...]:
        """The contact's addresses as text, cached because they are sent many times."""
        return tuple(str(address) for address in self.contact.addresses)

    def same_home_as(self, node: Node) -> bool:
        # The library compares ip and port, which none of our nodes has, and would drop all of them.
        return bool(self.id == node.id)

    def __repr__(self) -> str:
        return f"<PeerNode {self.contact.peer_id}>"


class Bucket(KBucket):  # type: ignore[misc]  # kademlia publishes no types
    """A KBucket with a clock argument."""

    def __init__(self, low: int, high: int, ksize: int, now: Callable[[], float]) -> None:
        self._now = now
        super().__init__(low, high, ksize)

    def touch_last_updated(self) -> None:
        self.last_updated = self._now()

    def split(self) -> tuple[Bucket, Bucket]:
        # Like the library's method, which would make plain KBuckets.
        middle = (self.range[0] + self.range[1]) // 2
        lower = Bucket(self.range[0], middle, self.ksize, self._now)
        upper = Bucket(middle + 1, self.range[1], self.ksize, self._now)
        for node in (*self.nodes.values(), *self.replacement_nodes.values()):
            (lower if node.long_id <= middle else upper).add_node(node)
        lower.last_updated = upper.last_updated = self.last_updated
        return lower, upper

    def make_room_for(self, node: PeerNode) -> bool:
        """In a full bucket, replace a peer of a network that has more than its share there."""
        networks = Counter(other.network for other in self.nodes.values() if other.network)
        network, most = max(networks.items(), key=lambda item: item[1], default=("", 0))
        if most <= PEERS_A_NETWORK or networks[node.network] >= PEERS_A_NETWORK:
            return False
        newest = next(other for other in reversed(self.nodes.values()) if other.network == network)
        del self.nodes[newest.id]
        self.replacement_nodes.pop(node.id, None)
        self.nodes[node.id] = node
        return True

    def depth(self) -> int:
        # The prefix shared by all ids is the one shared by the least and the greatest. The library writes out all bits.
        ids = [node.long_id for node in self.nodes.values()]
        return int(160 - (min(ids) ^ max(ids)).bit_length())

    def distance_to(self, target: int) -> int:
        """The distance from `target` to the nearest id in the range; the range is all ids with one prefix."""
        low, high = self.range
        return int((low ^ target) & ~(high - low))


def _ignore(_node: PeerNode) -> None:
    pass


class ContactTable(RoutingTable):  # type: ignore[misc]  # kademlia publishes no types
    """Up to `ksize` contacts for each range of distances from `own`. `now` is any steady count of seconds.

    on_removed: called with each contact that is removed.
    """

    def __init__(
        self, own: Node, ksize: int, now: Callable[[], float], on_removed: Callable[[PeerNode], None] = _ignore
    ) -> None:
        self._now = now
        self._on_removed = on_removed
        self._suspects: dict[bytes, PeerNode] = {}
        # When each contact was last heard of. A replacement that was just promoted has no entry.
        self._heard: dict[bytes, float] = {}
        super().__init__(None, ksize, own)

    def flush(self) -> None:
        # The library's last id is too large by one, so that its ranges would not be prefixes.
        self.buckets = [Bucket(0, 2**160 - 1, self.ksize, self._now)]
        self._starts = [0]

    def split_bucket(self, index: int) -> None:
        super().split_bucket(index)
        self._starts = [bucket.range[0] for bucket in self.buckets]

    def get_bucket_for(self, node: Node) -> int:
        # The library looks at one bucket after the other.
        return bisect_right(self._starts, node.long_id) - 1

    def __iter__(self) -> Iterator[PeerNode]:
        for bucket in self.buckets:
            yield from bucket.nodes.values()

    def __len__(self) -> int:
        return sum(map(len, self.buckets))

    def __contains__(self, node: Node) -> bool:
        return self.get(node.id) is not None

    def get(self, node_id: bytes) -> PeerNode | None:
        """The contact with this id; None if it is not in the table."""
        found: PeerNode | None = self.buckets[self.get_bucket_for(Node(node_id))][node_id]
        return found

    def add_contact(self, node: PeerNode) -> None:
        """Note that this peer is alive. In a full bucket it waits until the contact that was silent for longest
        fails.
        """
        index = self.get_bucket_for(node)
        bucket = self.buckets[index]
        if bucket.add_node(node) or bucket.make_room_for(node):
            self._heard[node.id] = self._now()
            return
        # Paper, 4.2: always split the range that contains our own id, others until their depth is a multiple of 5.
        if bucket.has_in_range(self.node) or bucket.depth() % 5 != 0:
            self.split_bucket(index)
            self.add_contact(node)
        else:
            # The library pings through asyncio here; we keep a list, which `Dht.refresh` pings.
            self.suspect(bucket.head())

    def remove_contact(self, node: Node) -> None:
        """Forget a peer; the newest peer that waited for its place takes it."""
        if (known := self.get(node.id)) is not None:
            self._on_removed(known)
        super().remove_contact(node)
        self._suspects.pop(node.id, None)
        self._heard.pop(node.id, None)

    def suspect(self, node: PeerNode) -> None:
        """Have this peer pinged, if it is in the table."""
        if node in self:
            self._suspects[node.id] = node

    def take_suspects(self) -> list[PeerNode]:
        """The peers to ping now, including those that were silent for long; each is returned once."""
        quiet_since = self._now() - QUIET_S
        for node in self:
            if self._heard.get(node.id, quiet_since) <= quiet_since:
                self._suspects[node.id] = node
        suspects = list(self._suspects.values())
        self._suspects.clear()
        # A peer that is pinged answers, or leaves the table.
        self._heard |= {node.id: self._now() for node in suspects}
        return suspects

    def lonely_buckets(self) -> list[Bucket]:
        """The buckets in whose range nothing was looked up for an hour."""
        return [bucket for bucket in self.buckets if bucket.last_updated < self._now() - IDLE_BUCKET_S]

    def touch(self, node: Node) -> None:
        """Note that something was looked up at this id."""
        self.buckets[self.get_bucket_for(node)].touch_last_updated()

    def find_neighbors(self, node: Node, k: int | None = None, exclude: Node | None = None) -> list[PeerNode]:
        """The k contacts nearest to `node`, nearest first; at most two of one network, as long as there are others.

        The library walks outwards bucket by bucket, left and right in turns, which misses 14-23 % of the nearest. The
        buckets' ranges do not overlap in their distances from an id, so in that order the first buckets with k contacts
        suffice.
        """
        wanted = k or self.ksize
        target = node.long_id
        found: list[PeerNode] = []
        different = 0
        taken: Counter[str] = Counter()
        for bucket in sorted(self.buckets, key=lambda bucket: bucket.distance_to(target)):
            if different >= wanted:
                break
            for other in bucket.nodes.values():
                if exclude is None or other.id != exclude.id:
                    found.append(other)
                    taken[other.network] += bool(other.network)
                    different += taken[other.network] <= PEERS_A_NETWORK
        return spread(sorted(found, key=node.distance_to), wanted)


def dump_contacts(contacts: Iterable[Contact]) -> str:
    """The contacts as JSON, which can be read in an editor and, unlike the library's pickle, runs no code."""
    listed = [{"peer_id": c.peer_id, "addresses": [str(address) for address in c.addresses]} for c in contacts]
    return json.dumps({"version": 1, "contacts": listed}, indent=1)


def load_contacts(text: str) -> list[Contact]:
    """Read the text that `dump_contacts` wrote. Raises ValueError if it is anything else."""
    try:
        state = json.loads(text)
        if state["version"] != 1:
            raise ValueError(f"version {state['version']!r} instead of 1")
        contacts = [
            Contact(PeerId(entry["peer_id"]), tuple(Multiaddr.parse(address) for address in entry["addresses"]))
            for entry in state["contacts"]
        ]
        for contact in contacts:
            public_key_of(contact.peer_id)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a list of contacts: {error!r}") from None
    return contacts

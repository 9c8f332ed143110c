"""Looks up which peers serve which blocks of a model, and turns their records into offers.

A span's records lie under several DHT keys and may be of different ages. For each slot only the newest counts,
wherever and whenever it was seen, so that a span that moved or went offline is never offered from an older copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import SHARD_BLOCKS, PeerRecord, ServerRecord, SignedRecord, VerifiedRecord
from peerd.routing.dht.odd_times import OddTimes
from peerd.routing.dht.record_sets import RecordSource, addresses_of, newest, servers_of
from peerd.routing.directory.announcer import TTL_S
from peerd.routing.directory.holding import Holding
from peerd.routing.directory.offer import Offer

# A new server should be used within 5 s, of which announcing, looking up and measuring it take a part. A client that
# opens sessions all the time makes 20 lookups a minute for each 16 blocks, with 13 small questions each.
CACHE_S = 3.0
# A server whose addresses were not found is probably new: its two records do not arrive together.
NOT_FOUND_CACHE_S = 1.0
# Each further time it is looked up after twice as long, up to this. Anybody can announce servers without addresses,
# and every client would look them up again all the time.
MAX_NOT_FOUND_CACHE_S = 120.0
# So many of those that were not found are looked up again at a time, longest ago first. Newcomers do not wait for them.
RETRIES_AT_ONCE = 16
# Addresses change seldom. Clients pass the record of a hop to another hop, which must still find it valid.
PEER_CACHE_S = 60.0


@dataclass(slots=True)
class _Model:
    """The state of one model: its server records that have not expired, and when they were last looked up.

    seen: when each record was first seen, by its signature. A living server renews its record three times in the
        record's lifetime. So a longer lifetime, given by a wrong clock or a lie, is not believed: no record counts
        beyond `TTL_S`.
    offers: the offers made of the records, by both records' signatures, since reading a thousand addresses takes a
        while.
    latest: the list that was returned last.
    """

    records: list[VerifiedRecord]
    looked_up: float
    seen: dict[bytes, float] = field(default_factory=dict)
    offers: dict[tuple[bytes, bytes], Offer | None] = field(default_factory=dict)
    latest: list[Offer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Peer:
    """The result of looking up a peer's addresses, and its time."""

    record: VerifiedRecord | None
    looked_up: float
    # How often in a row nothing was found.
    misses: int = 0

    def is_fresh(self, now: float) -> bool:
        if self.record is None:
            pause_s = NOT_FOUND_CACHE_S * 2.0 ** min(self.misses - 1, 16)
            return now < self.looked_up + min(pause_s, MAX_NOT_FOUND_CACHE_S)
        return now < min(self.looked_up + PEER_CACHE_S, self.record.body.expires - PEER_CACHE_S)

    def is_of_use(self, now: float) -> bool:
        if self.record is None:
            return now < self.looked_up + 2 * MAX_NOT_FOUND_CACHE_S
        return self.is_fresh(now) or now < self.record.body.expires


class Directory:
    """Looks up the peers that serve a model. `now` gives unix seconds, corrected (spec/discovery/records.md)."""

    def __init__(self, source: RecordSource, now: Callable[[], float], odd_times: OddTimes | None = None) -> None:
        self._source = source
        self._now = now
        self._odd_times = odd_times or OddTimes()
        #: Peers that take our sessions though they announce that they take none: ourselves, while we serve only
        #: programs on this machine.
        self.open_to_us: set[PeerId] = set()
        self._models: dict[bytes, _Model] = {}
        self._peers: dict[PeerId, _Peer] = {}

    async def servers(self, model: bytes, block_count: int, *, max_age_s: float = CACHE_S) -> list[Offer]:
        """The offers for all blocks of a model (a digest), from peers whose addresses are known too.

        Offers are in any state but `offline`: a peer that is joining or draining takes no sessions, but counts for
        placement. A result that is younger than `max_age_s` is not looked up again. While nothing has changed, the
        same list object is returned, which the caller must not change.
        """
        servers = await self._server_records(model, block_count, max_age_s)
        await self._find_peers({record.peer_id for record in servers})
        known = self._models[model]
        offers: dict[tuple[bytes, bytes], Offer | None] = {}
        for server in servers:
            found = self._peers.get(server.peer_id)
            if found is not None and (peer := found.record) is not None:
                key = (server.signed.signature, peer.signed.signature)
                offers[key] = known.offers[key] if key in known.offers else self._offer(server, peer)
        known.offers = offers
        latest = [o for o in known.offers.values() if o is not None and o.span.end <= block_count]
        if len(latest) != len(known.latest) or any(a is not b for a, b in zip(latest, known.latest, strict=True)):
            known.latest = latest
        return known.latest

    async def holdings(self, model: bytes, block_count: int) -> list[Holding]:
        """Which peer holds or announces to hold which span of a model (a digest); placement is planned with this.

        Always looks up. Raises PartialView: if only a few peers answered, servers may be missing, and the caller
        would fill gaps that do not exist.
        """
        known = self._models.setdefault(model, _Model([], float("-inf")))
        await self._look_up(known, model, block_count, whole=True)
        bodies = [(record.peer_id, record.body) for record in self._unexpired(known)]
        return [
            Holding(peer_id, body)
            for peer_id, body in bodies
            if isinstance(body, ServerRecord) and body.state != "offline" and body.span.end <= block_count
        ]

    async def peer_record(self, peer_id: PeerId) -> SignedRecord | None:
        """The signed record of the peer's addresses, valid for some time yet; None if it cannot be found."""
        record = await self._peer(peer_id)
        return None if record is None else record.signed

    async def ways_to(self, peer_id: PeerId) -> tuple[Multiaddr, ...]:
        """The peer's announced addresses, each with its PeerId; () if they cannot be found."""
        record = await self._peer(peer_id)
        return record.body.ways_to(peer_id) if record is not None and isinstance(record.body, PeerRecord) else ()

    def odd_clocks(self, model: bytes, missing: Collection[tuple[int, int]]) -> list[str]:
        """Why servers of these blocks may be invisible though they announce themselves: a sentence each."""
        return self._odd_times.explain(model, missing, self._now())

    def is_server(self, peer_id: PeerId) -> bool:
        """Whether the peer was lately found to serve something."""
        return peer_id in self._peers

    def doubt(self, peer_id: PeerId) -> None:
        """The peer was not at its announced address: look its record up again before using it."""
        if (known := self._peers.get(peer_id)) is not None:
            self._peers[peer_id] = _Peer(known.record, float("-inf"))

    async def _peer(self, peer_id: PeerId) -> VerifiedRecord | None:
        await self._find_peers({peer_id})
        # Another task's lookup may have dropped the peer meanwhile; then it was not found either.
        return known.record if (known := self._peers.get(peer_id)) is not None else None

    async def _server_records(self, model: bytes, block_count: int, max_age_s: float) -> list[VerifiedRecord]:
        known = self._models.setdefault(model, _Model([], float("-inf")))
        if self._now() - known.looked_up >= max_age_s:
            await self._look_up(known, model, block_count)
        return self._unexpired(known)

    async def _look_up(self, known: _Model, model: bytes, block_count: int, *, whole: bool = False) -> None:
        shards = range((block_count - 1) // SHARD_BLOCKS + 1)
        found = await self._source.get_many([servers_of(model, shard) for shard in shards], whole=whole)
        # Records that were seen before count as well, so that a peer with an older copy cannot bring it back.
        known.records = newest(record for part in (known.records, *found) for record in part)
        known.looked_up = self._now()

    def _unexpired(self, known: _Model) -> list[VerifiedRecord]:
        """The records that count. Others are kept until they expire, so that no older copy comes back."""
        now = self._now()
        known.records = [record for record in known.records if record.body.expires > now]
        known.seen = {r.signed.signature: known.seen.get(r.signed.signature, now) for r in known.records}
        return [record for record in known.records if now <= known.seen[record.signed.signature] + TTL_S]

    async def _find_peers(self, peers: set[PeerId]) -> None:
        now = self._now()
        self._peers = {peer: known for peer, known in self._peers.items() if known.is_of_use(now)}
        wanted = self._to_look_up(peers, now)
        found = await self._source.get_many([addresses_of(peer) for peer in wanted])
        for peer, records in zip(wanted, found, strict=True):
            before = self._peers.get(peer)
            # An older copy counts as if none was found.
            known = newest([*records, *([before.record] if before and before.record else [])])
            misses = 0 if known else (before.misses if before else 0) + 1
            self._peers[peer] = _Peer(known[0] if known else None, now, misses)

    def _to_look_up(self, peers: set[PeerId], now: float) -> list[PeerId]:
        """Whose addresses to look up now: of all whom we do not know, and of some that were not found before."""
        due = sorted(peer for peer in peers if peer not in self._peers or not self._peers[peer].is_fresh(now))
        missed = [peer for peer in due if peer in self._peers and self._peers[peer].misses]
        missed.sort(key=lambda peer: self._peers[peer].looked_up)
        later = set(missed[RETRIES_AT_ONCE:])
        return [peer for peer in due if peer not in later]

    def _offer(self, record: VerifiedRecord, peer: VerifiedRecord) -> Offer | None:
        server = record.body
        if not isinstance(server, ServerRecord) or not isinstance(peer.body, PeerRecord) or server.state == "offline":
            return None
        if server.state == "draining" and record.peer_id in self.open_to_us:
            server = replace(server, state="online")
        return Offer(record.peer_id, server, peer.body.ways_to(record.peer_id), peer.signed)

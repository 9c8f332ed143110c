"""Who serves which blocks of a model, as the DHT knows it now.

Knows how records become offers; plans nothing. The difficulty is that a span's records lie under several
keys and may be of different ages: of each slot the newest counts, wherever and whenever it was seen, so
that a span that moved or went offline is never offered from an older copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peerd.protocol.identity import PeerId
from peerd.protocol.records import SHARD_BLOCKS, PeerRecord, ServerRecord, VerifiedRecord
from peerd.routing.offer import Offer
from peerd.routing.record_sets import RecordSource, addresses_of, newest, servers_of

# A swarm changes by the minute; a client that opens several sessions at once should look it up once.
CACHE_S = 5.0


@dataclass(slots=True)
class _Seen:
    """What is known of one model: server records that have not expired, and when they were last looked up."""

    records: list[VerifiedRecord]
    looked_up: float


class Directory:
    """Looks up the peers that serve a model. `now` gives unix seconds, corrected (spec/records.md)."""

    def __init__(self, source: RecordSource, now: Callable[[], float]) -> None:
        self._source = source
        self._now = now
        self._models: dict[bytes, _Seen] = {}
        self._peers: dict[PeerId, VerifiedRecord] = {}

    async def servers(self, model: bytes, block_count: int, *, max_age_s: float = CACHE_S) -> list[Offer]:
        """The offers of all blocks of a model (digest), by peers whose addresses are known too.

        They are in any state but `offline`: who is joining or draining takes no sessions, but counts for
        placement. What was looked up less than `max_age_s` ago is not looked up again.
        """
        servers = await self._server_records(model, block_count, max_age_s)
        await self._find_peers({record.peer_id for record in servers})
        return [offer for record in servers if (offer := self._offer(record, block_count)) is not None]

    async def _server_records(self, model: bytes, block_count: int, max_age_s: float) -> list[VerifiedRecord]:
        seen = self._models.setdefault(model, _Seen([], float("-inf")))
        if self._now() - seen.looked_up >= max_age_s:
            shards = range((block_count - 1) // SHARD_BLOCKS + 1)
            found = await self._source.get_many([servers_of(model, shard) for shard in shards])
            # What was seen before counts as well: a peer that holds an older copy must not bring it back.
            seen.records = newest(record for part in (seen.records, *found) for record in part)
            seen.looked_up = self._now()
        seen.records = [record for record in seen.records if record.body.expires > self._now()]
        return seen.records

    async def _find_peers(self, peers: set[PeerId]) -> None:
        self._peers = {peer: record for peer, record in self._peers.items() if record.body.expires > self._now()}
        unknown = sorted(peers - self._peers.keys())
        for records in await self._source.get_many([addresses_of(peer) for peer in unknown]):
            self._peers.update((record.peer_id, record) for record in records)

    def _offer(self, record: VerifiedRecord, block_count: int) -> Offer | None:
        server, peer = record.body, self._peers.get(record.peer_id)
        if not isinstance(server, ServerRecord) or peer is None or not isinstance(peer.body, PeerRecord):
            return None
        if server.state == "offline" or server.span.end > block_count:
            return None
        return Offer(record.peer_id, server, peer.body.ways_to(record.peer_id), peer.signed)

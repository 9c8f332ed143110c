"""One span that a peer offers to serve: the unit in which chains are planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import SHARD_BLOCKS, ServerRecord, SignedRecord, shards_of
from peerd.protocol.span import Span
from peerd.routing.directory.standing import StandingOf, unknown, weight_of


@dataclass(frozen=True, slots=True)
class Offer:
    """A peer's announcement of one span, with the peer's addresses (best first).

    peer_record: the peer's own signed record of its addresses, which the client gives to the hop before it.
    """

    peer_id: PeerId
    record: ServerRecord
    addresses: tuple[Multiaddr, ...]
    peer_record: SignedRecord

    @property
    def span(self) -> Span:
        return self.record.span

    @property
    def block_s(self) -> float:
        """Seconds that one position takes through one block; 1 s if the peer never measured it."""
        return 1 / max(self.record.throughput, 1.0)


def agreeing(offers: Sequence[Offer], standing: StandingOf = unknown) -> list[Offer]:
    """The offers without those whose blocks differ from what the peers that weigh most have in their place.

    Two offers can be compared if they hold the same blocks of a shard. This catches a corrupted or differently
    converted checkpoint, not a lie. Offers without block digests are kept.
    """
    if _all_agree(offers):
        return list(offers)
    votes: dict[tuple[int, int], dict[bytes, set[PeerId]]] = {}
    for offer in offers:
        for part, root in _rooted_parts(offer.record):
            votes.setdefault(part, {}).setdefault(root, set()).add(offer.peer_id)
    # If two weigh the same, the greater root: every client must decide alike, or replacements would not fit.
    chosen = {
        part: max(roots, key=lambda root: (weight_of(roots[root], standing), root)) for part, roots in votes.items()
    }
    return [offer for offer in offers if all(chosen[part] == root for part, root in _rooted_parts(offer.record))]


def _all_agree(offers: Iterable[Offer]) -> bool:
    """Whether all offers agree, as almost always. This check is much faster than the vote."""
    roots: dict[tuple[int, int], bytes] = {}
    for offer in offers:
        record = offer.record
        if record.block_roots:
            for part, root in zip(_parts(record.span.start, record.span.end), record.block_roots, strict=True):
                if roots.setdefault(part, root) != root:
                    return False
    return True


def _rooted_parts(record: ServerRecord) -> Iterable[tuple[tuple[int, int], bytes]]:
    """Each part of the span that lies within one shard, with the root of its blocks' digests."""
    if not record.block_roots:
        return ()
    return zip(_parts(record.span.start, record.span.end), record.block_roots, strict=True)


@lru_cache(maxsize=16384)
def _parts(start: int, end: int) -> tuple[tuple[int, int], ...]:
    """A span cut at the borders of shards."""
    return tuple(
        (max(shard * SHARD_BLOCKS, start), min((shard + 1) * SHARD_BLOCKS, end))
        for shard in shards_of(Span(start, end))
    )

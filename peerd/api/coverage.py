"""Which blocks of a model have how many servers, from what peers announce, in figures and in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel
    from peerd.peer import Peer
    from peerd.routing.directory.offer import Offer


async def offers_of(peer: Peer, model: SwarmModel, max_age_s: float) -> list[Offer]:
    """The spans of a model that peers announce, in any state, looked up at most `max_age_s` ago."""
    directory, facts = peer.discovery.directory, model.facts
    return list(await directory.servers(facts.digest, facts.block_count, max_age_s=max_age_s))


def usable(offers: Iterable[Offer], model: SwarmModel) -> list[Offer]:
    """The offers that accept sessions now: not those of servers that are joining or leaving, nor of those that we have
    found to be gone, whose announcements last for another minute.
    """
    gone = model.unreachable()
    return [offer for offer in offers if offer.record.state == "online" and offer.peer_id not in gone]


def coverage_of(model: SwarmModel, offers: Sequence[Offer]) -> list[tuple[int, int, int]]:
    """Runs of blocks with the same number of servers: start, end, number of servers."""
    # How many more servers a block has than the one before it: there may be thousands of long spans.
    changes = [0] * (model.facts.block_count + 1)
    for offer in offers:
        changes[offer.span.start] += 1
        changes[offer.span.end] -= 1
    owners = list(accumulate(changes))[:-1]
    runs = []
    for count, blocks in groupby(range(len(owners)), key=lambda block: owners[block]):
        numbers = list(blocks)
        runs.append((numbers[0], numbers[-1] + 1, count))
    return runs


def missing_of(coverage: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """The runs without a server: start, end."""
    return [(start, end) for start, end, owners in coverage if not owners]


def needs(missing: Sequence[tuple[int, int]]) -> str:
    """What a model lacks, as people count: `needs 3 more blocks: 40-42`. `missing`: runs of blocks, start and end."""
    count = sum(end - start for start, end in missing)
    runs = ", ".join(str(start) if end - start == 1 else f"{start}-{end - 1}" for start, end in missing)
    return f"needs {count} more block{'s' if count > 1 else ''}: {runs}"

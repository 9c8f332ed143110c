"""Finds the names of the models that a swarm serves, as their servers announce them.

The names are unproven; a wrong one is caught by the digest of the weights. If each of a popular model's thousand
servers announced its name, they would fill a set of records that all models need. So only a few of them do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from peerd.protocol.identity import PeerId, node_id_of
from peerd.protocol.records.envelope import ModelRecord, VerifiedRecord
from peerd.routing.dht.record_sets import RecordSource, words_for_models
from peerd.routing.directory.holding import Holding

# How many of a model's servers announce its name: enough that some remain between two looks, whatever the churn.
ANNOUNCERS = 16


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model with the name that most of its `announcers` give, which say that they serve it. `commit` is on the
    hub.
    """

    digest: bytes
    name: str
    hub_id: str
    commit: str
    block_count: int
    announcers: frozenset[PeerId]

    def __str__(self) -> str:
        return self.hub_id or self.name


async def named_models(source: RecordSource) -> list[NamedModel]:
    """The models of the swarm, those with most announcers first. Raises PartialView."""
    (records,) = await source.get_many([words_for_models()], whole=True)
    by_model: dict[bytes, list[VerifiedRecord]] = defaultdict(list)
    for record in records:
        if isinstance(record.body, ModelRecord):
            by_model[record.body.model].append(record)
    models = [_named(of_one) for of_one in by_model.values()]
    return sorted(models, key=lambda model: (-len(model.announcers), model.digest))


def should_announce(models: Iterable[NamedModel], digest: bytes, own: PeerId) -> bool:
    """Whether we are among the servers that announce the name of the model `digest`."""
    others = next((model.announcers for model in models if model.digest == digest), frozenset())
    target = int.from_bytes(digest[:20], "big")
    nearest = sorted(others | {own}, key=lambda peer: int.from_bytes(node_id_of(peer), "big") ^ target)
    return own in nearest[:ANNOUNCERS]


def least_rate(holdings: Sequence[Holding], block_count: int) -> float:
    """The positions a second that one more session gets at the weakest block: 0 if a block has no server.

    A server with a queue counts for less, so the rate falls with demand as it does with fewer servers.
    """
    rates = [0.0] * block_count
    for holding in holdings:
        record = holding.record
        if record.state in ("joining", "online"):
            step_s = len(record.span) / max(record.throughput, 1.0) + record.queue_s
            for block in range(record.span.start, min(record.span.end, block_count)):
                rates[block] += 1 / step_s
    return min(rates)


def _named(records: Sequence[VerifiedRecord]) -> NamedModel:
    # Use the name that most announcers agree on. A wrong name is caught by the digest.
    words = Counter(replace(record.body, seq=0, expires=0.0) for record in records)
    body = max(words, key=lambda one: (words[one], repr(one)))
    assert isinstance(body, ModelRecord)
    announcers = frozenset(record.peer_id for record in records)
    return NamedModel(body.model, body.name, body.hub_id, body.revision, body.block_count, announcers)

"""The view of the swarm on the page: each model's servers, the coverage of its blocks, and how another machine
joins.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peerd.api.coverage import coverage_of, offers_of, usable
from peerd.api.web.history import History
from peerd.api.web.invitations import invitation_of

if TYPE_CHECKING:
    from peerd.api.models import Models
    from peerd.client.model import SwarmModel
    from peerd.peer import Peer
    from peerd.protocol.identity import PeerId
    from peerd.routing.directory.offer import Offer

# The page asks every few seconds; several open pages share one lookup.
_MAX_AGE_S = 2.0
# How many peers the page lists at most; the figures above the list count all of them.
_MOST_PEERS = 500


class SwarmView:
    """The daemon's view of the swarm, computed for each question."""

    def __init__(self, peer: Peer, models: Models, history: History) -> None:
        self._peer = peer
        self._models = models
        self._history = history

    async def describe(self) -> dict[str, Any]:
        """Return the view as JSON (spec/local-api.md)."""
        return {
            "peer_id": str(self._peer.peer_id),
            "models": [await self._describe_model(name, model) for name, model in self._models],
            "history": [
                {"at": round(sample.at), "tokens": sample.tokens, "coverage": dict(sample.coverage)}
                for sample in self._history.samples
            ],
        }

    async def coverage(self) -> Mapping[str, float]:
        """For each model the share of its blocks that have a server now, 0 to 1. Also notes which servers there are."""
        shares = {}
        for name, model in self._models:
            offers = await offers_of(self._peer, model, _MAX_AGE_S)
            self._history.since(name, {str(offer.peer_id) for offer in offers})
            runs = coverage_of(model, usable(offers, model))
            covered = sum(end - start for start, end, servers in runs if servers)
            shares[name] = round(covered / model.facts.block_count, 4)
        return shares

    async def _describe_model(self, name: str, model: SwarmModel) -> dict[str, Any]:
        offers = await offers_of(self._peer, model, _MAX_AGE_S)
        online, gone = usable(offers, model), model.unreachable()
        since = self._history.since(name, {str(offer.peer_id) for offer in offers})
        runs = coverage_of(model, online)
        return {
            "name": name,
            "block_count": model.facts.block_count,
            "max_length": model.facts.max_length,
            "covered": all(servers for _, _, servers in runs),
            "coverage": [{"start": start, "end": end, "servers": servers} for start, end, servers in runs],
            "server_count": len({offer.peer_id for offer in online}),
            "servers": [self._describe_offer(offer, since, gone) for offer in _in_order(offers)[:_MOST_PEERS]],
            "join": self._join_command(model),
            "invitation": None if (found := invitation_of(self._peer, model.facts)) is None else str(found),
        }

    def _describe_offer(self, offer: Offer, since: Mapping[str, float], gone: Collection[PeerId]) -> dict[str, Any]:
        record = offer.record
        connection = self._peer.connections.live.get(offer.peer_id)
        rtt_s = None if connection is None else connection.rtt_s
        return {
            "peer_id": str(offer.peer_id),
            "start": record.span.start,
            "end": record.span.end,
            "state": record.state,
            "positions_a_second": round(record.throughput / len(record.span), 1),
            "free_tokens": record.free_tokens,
            "queue_ms": round(record.queue_s * 1000, 1),
            "dtype": record.dtype,
            "quantization": record.quantization,
            "adapters": list(record.adapters),
            "rtt_ms": None if rtt_s is None else round(rtt_s * 1000, 2),
            "way": None if connection is None else connection.way,
            "address": str(offer.addresses[0]) if offer.addresses else None,
            "seen_since": round(since[str(offer.peer_id)]),
            "reached": offer.peer_id not in gone,
            "is_us": offer.peer_id == self._peer.peer_id,
        }

    def _join_command(self, model: SwarmModel) -> str | None:
        """The command with which another machine serves blocks of the model; None while we have no address to give."""
        invitation = invitation_of(self._peer, model.facts)
        if invitation is None:
            return None
        # A model that is on no hub is a directory, which has another path on another machine.
        words = [] if model.facts.hub_name else ["--model", f"PATH/TO/{model.facts.name}"]
        if invitation.swarm is not None:
            words += ["--swarm-key", "PATH/TO/KEY"]
        return shlex.join(["peerd", "join", str(invitation), "--serve-blocks", "auto", *words])


def _in_order(offers: Sequence[Offer]) -> list[Offer]:
    return sorted(offers, key=lambda offer: (offer.span.start, offer.span.end, str(offer.peer_id)))

"""The daemon's status: its identity, the peers that it knows, the spans that it serves, and whether models are
covered.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import trio

from peerd import __version__
from peerd.api.coverage import coverage_of, missing_of, needs, offers_of, usable

if TYPE_CHECKING:
    from peerd.api.models import Models
    from peerd.client.model import SwarmModel
    from peerd.peer import Peer
    from peerd.routing.directory.offer import Offer

# How many scores, and how many avoided peers, a status lists: the worst.
MAX_LISTED = 64
# How much it tells of a reason, which may be a stranger's words.
MAX_WHY = 200
# Status need not be fresher than this, which spares the DHT.
_MAX_AGE_S = 2.0


class Status:
    """The daemon's status, computed for each question."""

    def __init__(self, peer: Peer, models: Models) -> None:
        self._peer = peer
        self._models = models
        self._started = time.monotonic()

    async def is_ready(self) -> tuple[bool, str]:
        """Whether every block of each model has a server; if not, which blocks each model needs, in words."""
        # Do not report "not ready" from the 2 s cache: look again before saying so.
        gaps = await self._gaps(_MAX_AGE_S) and await self._gaps(0.0)
        return not gaps, "; ".join(gaps)

    async def _gaps(self, max_age_s: float) -> list[str]:
        gaps = []
        for name, model in self._models:
            coverage = coverage_of(model, await self._offers(model, max_age_s))
            if missing := missing_of(coverage):
                gaps.append(f"{name} {needs(missing)}")
        return gaps

    async def describe(self) -> dict[str, Any]:
        """The complete status as JSON."""
        peer = self._peer
        connections = peer.connections.live
        return {
            "version": __version__,
            "peer_id": str(peer.peer_id),
            "addresses": [str(address) for address in peer.addresses],
            "reachability": _reachability(peer),
            "relayed_by": _relayed_by(peer),
            "relaying": _relaying(peer),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "peers": [
                {
                    "peer_id": str(peer_id),
                    "rtt_ms": _milliseconds(connection.rtt_s),
                    "way": connection.way,
                    "relay": None if connection.relay is None else str(connection.relay.peer_id),
                }
                for peer_id, connection in sorted(connections.items(), key=lambda item: str(item[0]))
            ],
            "refused": _refused(peer),
            "avoided": _avoided(peer),
            "serving": [
                {
                    "model": served.model.hex(),
                    "blocks": str(served.span),
                    "free_tokens": served.task.engine.free_tokens,
                    "total_tokens": served.task.engine.total_tokens,
                    "positions_computed": served.task.engine.positions_computed,
                }
                for served in peer.served
            ],
            "sessions": peer.server.sessions if peer.server is not None else 0,
            "convicted": [
                {
                    "peer_id": str(one.peer_id),
                    "ends_in_s": round(one.until - peer.discovery.clock(), 1),
                    "count": one.count,
                    "why": one.why,
                }
                for one in peer.discovery.track_record.convictions.standing()
            ],
            "models": [await self._describe_model(name, model) for name, model in self._models],
        }

    async def _describe_model(self, name: str, model: SwarmModel) -> dict[str, Any]:
        offers = await self._offers(model)
        coverage = coverage_of(model, offers)
        return {
            "name": name,
            "digest": model.facts.digest.hex(),
            "block_count": model.facts.block_count,
            "servers": len({offer.peer_id for offer in offers}),
            "covered": all(owners for _, _, owners in coverage),
            "audits": _audits(model),
            "coverage": [{"blocks": _blocks(start, end), "servers": owners} for start, end, owners in coverage],
        }

    async def _offers(self, model: SwarmModel, max_age_s: float = _MAX_AGE_S) -> list[Offer]:
        return usable(await offers_of(self._peer, model, max_age_s), model)


def _reachability(peer: Peer) -> dict[str, Any]:
    here = peer.reachability.here
    return {"state": here.reach.value, "seen_at": [str(ip) for ip in here.observed], "why": here.why}


def _refused(peer: Peer) -> list[dict[str, Any]]:
    """What peers and addresses did wrong lately, and for how long we refuse them."""
    return [
        {
            "name": score.name,
            "score": round(score.points, 1),
            "banned_s": round(score.banned_s, 1),
            "reasons": score.reasons,
        }
        for score in peer.connections.containment.scores.listed(trio.current_time())[:MAX_LISTED]
    ]


def _avoided(peer: Peer) -> list[dict[str, Any]]:
    """The servers that we leave out of our own chains."""
    return [
        {
            "peer_id": str(one.peer_id),
            "for_s": round(one.for_s, 1),
            "failures": one.failures,
            "why": one.why[:MAX_WHY],
        }
        for one in peer.discovery.track_record.avoidance()[:MAX_LISTED]
    ]


def _relayed_by(peer: Peer) -> list[dict[str, Any]]:
    """The relays that reach us, and the addresses at which others find them."""
    if peer.reservations is None:
        return []
    return [
        {"peer_id": str(held.relay), "addresses": [str(address) for address in held.addresses]}
        for held in peer.reservations.held.values()
    ]


def _relaying(peer: Peer) -> dict[str, int] | None:
    """The figures of our relay; None if this peer is not a relay."""
    if peer.relay is None:
        return None
    ledger = peer.relay.ledger
    return {
        "slots": ledger.slots,
        "max_slots": ledger.limits.slots,
        "circuits": ledger.circuits,
        "max_circuits": ledger.limits.circuits,
        "passed_bytes": peer.relay.passed_bytes,
    }


def _audits(model: SwarmModel) -> dict[str, Any] | None:
    """How the audits of the model's answers ended, by reason; None if none are made."""
    auditor = model.auditor
    if auditor is None:
        return None
    return {
        "probability": auditor.probability,
        "counts": dict(auditor.counts),
        "hop_counts": dict(auditor.replay_counts),
        "computed_positions": auditor.prefills.computed + auditor.replays.computed,
        "received_bytes": auditor.prefills.received_bytes,
    }


def _blocks(start: int, end: int) -> str:
    return f"{start}:{end}"


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)

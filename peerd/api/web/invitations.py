"""The link with which this daemon's swarm is joined: at which addresses, with which model.

It never holds the key of a private swarm: programs that may use the daemon, and pages in a browser, need not be able to
give it away. `peerd invite --with-key` reads the key's file itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from peerd.api.errors import ApiError
from peerd.api.web.qr import qr_rows
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import PeerId
from peerd.protocol.invitation import MAX_MODEL_CHARS, Invitation

if TYPE_CHECKING:
    from peerd.api.models import Models
    from peerd.client.blocks import ModelFacts
    from peerd.peer import Peer

# With two, one may be gone; more would make a QR code that fits into no terminal.
_MOST_PEERS = 2


def invitation_of(peer: Peer, facts: ModelFacts) -> Invitation | None:
    """The invitation to a model of the swarm; None while we have no address to give."""
    known = [(contact.peer_id, contact.addresses) for contact in peer.discovery.contacts()]
    peers = addresses_to_give([*known, (peer.peer_id, peer.addresses)])
    name = facts.hub_name or facts.name
    # A letter that is not ASCII takes up to twelve characters of a link.
    is_sayable = name.isprintable() and len(name.encode()) <= MAX_MODEL_CHARS
    return Invitation(peers, name if is_sayable else "", peer.connections.swarm) if peers else None


def addresses_to_give(peers: Iterable[tuple[PeerId, Iterable[Multiaddr]]]) -> tuple[Multiaddr, ...]:
    """Of the peers, at most two with an address each, at which most machines reach them: public ones before those of a
    LAN, and this machine's own only if there is nothing else. Among equals the first come first.
    """
    best: dict[PeerId, tuple[int, Multiaddr]] = {}
    for peer_id, addresses in peers:
        for address in addresses:
            found = (_narrowness(address), address.with_peer(peer_id))
            if address.is_dialable and (peer_id not in best or found[0] < best[peer_id][0]):
                best[peer_id] = found
    ranked = sorted(best.values(), key=lambda one: one[0])
    return tuple(address for narrow, address in ranked if not (narrow == 2 and ranked[0][0] < 2))[:_MOST_PEERS]


def _narrowness(address: Multiaddr) -> int:
    """0: reached from the internet, 1: from a LAN, 2: from this machine alone."""
    return 2 if address.is_loopback else int(address.is_private)


class InvitationsApi:
    """`/peerd/v1/invitation`: the link, and its QR code."""

    def __init__(self, peer: Peer, models: Models) -> None:
        self._peer = peer
        self._models = models

    def routes(self) -> list[BaseRoute]:
        return [Route("/peerd/v1/invitation", self.invitation)]

    async def invitation(self, request: Request) -> Response:
        """The invitation to the model that the query names, else to the first. Raises ApiError."""
        models = dict(self._models)
        if not models:
            raise ApiError(404, "this daemon offers no model to which it could invite", code="model_not_found")
        name = request.query_params.get("model", next(iter(models)))
        model = models.get(name) or self._models.named(name)
        found = invitation_of(self._peer, model.facts)
        if found is None:
            problem = "this daemon knows no address that others can dial: a bootstrap peer has one, peerd --listen"
            raise ApiError(409, problem, code="no_address")
        return JSONResponse(described(found))


def described(found: Invitation) -> dict[str, Any]:
    """An invitation as JSON (spec/local-api.md)."""
    link = str(found)
    return {
        "link": link,
        "qr": qr_rows(link),
        "private": found.swarm is not None,
        "reach": ("internet", "network", "machine")[min(map(_narrowness, found.peers))],
    }

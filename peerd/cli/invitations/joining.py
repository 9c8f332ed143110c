"""`peerd join`: what a daemon is to be, from a link and the options beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peerd.compute.checkpoint.hub.id import parse_hub_id
from peerd.compute.errors import CheckpointError
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.invitation import Invitation, swarm_digest

# The options of a daemon that a link stands for.
FROM_LINK = frozenset({"bootstrap", "among", "revision"})


def read_link(text: str) -> Invitation:
    """Raises InvalidRequest for anything but a whole invitation."""
    try:
        return Invitation.parse(text)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def key_of(invitation: Invitation, given: bytes | None, *, names_key: bool) -> bytes | None:
    """The key of the swarm to join. given: from a file, which is the command's own if `names_key`, else the
    configuration's. Raises InvalidRequest if it is another swarm's, or missing.
    """
    if invitation.swarm is None:
        if names_key:
            raise InvalidRequest("the link is for a swarm that is open to everybody: leave out --swarm-key")
        return None
    if given is not None and swarm_digest(given) == invitation.swarm:
        return given
    if invitation.key is not None and not names_key:
        return invitation.key
    if given is not None:
        raise InvalidRequest(
            "the swarm's key is not that of the link: ask for the right file, and add --swarm-key FILE"
        )
    raise InvalidRequest(
        "the link is for a private swarm and does not hold its key: ask for the file, and add --swarm-key FILE"
    )


def fill_in(options: dict[str, Any], invitation: Invitation) -> None:
    """Add what the link says to a daemon's options, as click gives them. Raises InvalidRequest if no model is known.

    Without an option that says what to be, it is a client with a page.
    """
    options |= {"bootstrap": invitation.peers, "among": (), "revision": None}
    if not options["models"]:
        options["models"] = ((None, _model_of(invitation)),)
    if options["serve_blocks"] is None and not any(options[name] for name in ("client", "socket_path", "http")):
        options |= {"client": True, "open_page": True}


def _model_of(invitation: Invitation) -> Path | str:
    name = invitation.model
    if not name:
        raise InvalidRequest("the link names no model: add --model MODEL")
    try:
        if parse_hub_id(name) is not None:
            return name
    except CheckpointError as error:
        raise InvalidRequest(f"the link names a model that cannot be used: {error}") from None
    raise InvalidRequest(
        f"the link invites to the model {name}, which is on no hub: get its files, and add --model PATH"
    )

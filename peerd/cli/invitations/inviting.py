"""`peerd invite`: prints the link with which another machine joins, and its QR code."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

from peerd.api.web.invitations import described
from peerd.api.web.qr import qr_rows
from peerd.cli.console import say, write
from peerd.cli.keys.swarm_key import read_swarm_key
from peerd.cli.watching.asking import NoDaemon, ask_daemon
from peerd.local.socket_path import default_socket_path
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.invitation import MAX_PEERS, Invitation, swarm_digest

# Readers are promised four modules; phones read two, and the code then fits into 80 columns.
_BORDER = 2
_HALVES = {("0", "0"): " ", ("1", "0"): "▀", ("0", "1"): "▄", ("1", "1"): "█"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inviting:
    """What was asked for. `bootstrap`: addresses to give instead of those that the daemon knows, where `names_peers`;
    otherwise only if no daemon runs. `shows_qr`: None shows the code on a terminal.
    """

    model: str | None = None
    socket_path: Path | None = None
    bootstrap: tuple[Multiaddr, ...] = ()
    names_peers: bool = False
    key_file: Path | None = None
    with_key: bool = False
    shows_qr: bool | None = None
    as_json: bool = False


async def invite(asked: Inviting) -> None:
    """Print the invitation. Raises InvalidRequest, Unresponsive."""
    found = await _found(asked)
    if asked.with_key:
        found = _with_key(found, asked.key_file)
    if asked.as_json:
        says = described(found) | {"model": found.model, "has_key": found.key is not None}
        write(json.dumps({name: value for name, value in says.items() if name != "qr"}, indent=2) + "\n")
        return
    write(f"{found}\n")
    if sys.stdout.isatty() if asked.shows_qr is None else asked.shows_qr:
        _show_qr(str(found))
    for line in notes(found):
        say(line)


async def _found(asked: Inviting) -> Invitation:
    if not asked.names_peers:
        question = "/peerd/v1/invitation"
        if asked.model is not None:
            question += f"?model={quote(asked.model, safe='')}"
        try:
            answer = await ask_daemon(asked.socket_path or default_socket_path(), question)
            return Invitation.parse(str(answer.get("link")))
        except NoDaemon as error:
            if not asked.bootstrap:
                raise InvalidRequest(f"{error}; or name peers of the swarm, --bootstrap ADDRESS") from None
    return _of_options(asked)


def _of_options(asked: Inviting) -> Invitation:
    """The invitation that the options describe, without a daemon. Raises InvalidRequest."""
    key = read_swarm_key(asked.key_file) if asked.key_file is not None else None
    model = asked.model or ""
    if Path(model).expanduser().exists():
        # A path means nothing elsewhere, and is nobody's business.
        model = Path(model).expanduser().resolve().name
    try:
        return Invitation(asked.bootstrap[:MAX_PEERS], model, swarm_digest(key) if key else None)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def _with_key(found: Invitation, key_file: Path | None) -> Invitation:
    if key_file is None:
        raise InvalidRequest("--with-key puts the key of a private swarm into the link: add --swarm-key FILE")
    key = read_swarm_key(key_file)
    if found.swarm is None:
        raise InvalidRequest("the swarm is open to everybody and has no key: leave out --with-key")
    if swarm_digest(key) != found.swarm:
        raise InvalidRequest(f"{key_file} holds the key of another swarm than that of the daemon")
    return replace(found, key=key)


def notes(found: Invitation) -> list[str]:
    """What a user must know before giving the link away."""
    lines = ["The other machine runs: peerd join LINK"]
    if found.key is not None:
        lines.append(
            "This link is a secret: it holds the swarm's key. Give it to those whom you invite, and to nobody else."
        )
    elif found.swarm is not None:
        lines.append(
            "The swarm is private: the other machine needs the file with its key too, as --swarm-key FILE. --with-key"
            " puts the key into the link."
        )
    if not found.model:
        lines.append("The link names no model: give one to peerd invite, or the other machine names it, --model MODEL.")
    reach = described(found)["reach"]
    if reach == "network":
        lines.append("Its addresses are those of a local network: it works inside that network only.")
    elif reach == "machine":
        lines.append("Its addresses are those of this machine: it works here only. Others reach a peer with --listen.")
    return lines


def _show_qr(link: str) -> None:
    rows = qr_rows(link)
    if rows is None:
        say("There is no QR code: the package segno is missing, or the link is too long.")
        return
    # Dark on white, whatever colours the terminal has.
    Console(highlight=False).print(Text(blocks(rows), style="black on bright_white"), no_wrap=True, crop=False)


def blocks(rows: tuple[str, ...]) -> str:
    """The code as text, with two rows in a line."""
    side = "0" * _BORDER
    width = len(rows[0]) + 2 * _BORDER
    padded = ["0" * width] * _BORDER + [side + row + side for row in rows] + ["0" * width] * _BORDER
    if len(padded) % 2:
        padded.append("0" * width)
    pairs = zip(padded[::2], padded[1::2], strict=True)
    return "\n".join("".join(_HALVES[pair] for pair in zip(upper, lower, strict=True)) for upper, lower in pairs)

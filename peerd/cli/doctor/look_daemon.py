"""Asks the daemon on this machine, if one runs, what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from peerd.cli.doctor.facts import DaemonFact
from peerd.cli.watching.asking import ask_daemon
from peerd.cli.watching.status import lacks
from peerd.protocol.errors import InvalidRequest, Unresponsive


async def look_at_daemon(socket_path: Path) -> DaemonFact:
    """The daemon behind a socket. Takes at most 10 s."""
    if not await trio.Path(socket_path).exists():
        return DaemonFact(socket_path)
    try:
        status = await ask_daemon(socket_path, "/peerd/v1/status")
        return _read(socket_path, status)
    except InvalidRequest as error:
        # The socket of a daemon that was killed lies there until the next one starts.
        return DaemonFact(socket_path, problem=str(error) if "another user" in str(error) else "")
    except (Unresponsive, KeyError, TypeError) as error:
        return DaemonFact(socket_path, problem=f"the daemon on {socket_path} does not answer as one: {error}")


def _read(socket_path: Path, status: dict[str, Any]) -> DaemonFact:
    gaps = [f"{model['name']} {lacks(model)}" for model in status["models"] if not model["covered"]]
    return DaemonFact(
        socket_path,
        version=status["version"],
        peer_id=status["peer_id"],
        reach=status["reachability"]["state"],
        why=status["reachability"]["why"],
        relays=tuple(relay["peer_id"] for relay in status["relayed_by"]),
        peers=len(status["peers"]),
        gaps=tuple(gaps),
    )

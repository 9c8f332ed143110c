"""`peerd peers`: who is in the swarm, as the daemon on this machine sees it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peerd.cli.console import printable, short, table, write
from peerd.cli.watching.asking import ask_daemon
from peerd.cli.watching.status import duration
from peerd.local.socket_path import default_socket_path

_HEADINGS = ("peer", "serves", "state", "speed", "free KV", "delay", "way", "seen for")


async def show_peers(socket_path: Path | None, *, as_json: bool) -> None:
    """Print the peers. Raises InvalidRequest if no daemon listens, and Unresponsive if it does not answer."""
    path = socket_path or default_socket_path()
    swarm = await ask_daemon(path, "/peerd/v1/swarm")
    status = await ask_daemon(path, "/peerd/v1/status")
    if as_json:
        write(json.dumps(listed(swarm, status), indent=2) + "\n")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    write(as_text(listed(swarm, status), width, time.time()) + "\n")


def listed(swarm: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
    """The servers of each model, and the connected peers that serve none of them."""
    servers = [{"model": model["name"], **server} for model in swarm["models"] for server in model["servers"]]
    serving = {server["peer_id"] for server in servers}
    others = [peer for peer in status["peers"] if peer["peer_id"] not in serving]
    return {"peer_id": swarm["peer_id"], "servers": servers, "others": others}


def as_text(found: Mapping[str, Any], width: int | None, now: float) -> str:
    """A table; if it is wider than the terminal, a paragraph for each peer. `now`: unix seconds."""
    rows = [_server(server, now) for server in found["servers"]]
    rows += [_other(peer) for peer in found["others"]]
    servers = len({server["peer_id"] for server in found["servers"]})
    summary = f"{_count(servers, 'server')}, {_count(len(found['others']), 'other peer')} connected"
    if not rows:
        return summary
    lines = table([_HEADINGS, *rows])
    if width is not None and max(map(len, lines.splitlines())) > width:
        lines = "\n".join(map(_paragraph, rows))
    return f"{lines}\n\n{summary}"


def _server(server: Mapping[str, Any], now: float) -> Sequence[str]:
    blocks = f"{server['start']}:{server['end']} of {server['model']}"
    return (
        "this peer" if server["is_us"] else short(server["peer_id"]),
        printable(blocks),
        printable(server["state"]),
        f"{server['positions_a_second']:g}/s",
        f"{server['free_tokens']}",
        _delay(server["rtt_ms"]),
        server["way"] or "not connected",
        duration(max(0.0, now - server["seen_since"])),
    )


def _other(peer: Mapping[str, Any]) -> Sequence[str]:
    return (short(peer["peer_id"]), "", "", "", "", _delay(peer["rtt_ms"]), peer["way"], "")


def _paragraph(row: Sequence[str]) -> str:
    values = [f"  {heading}: {cell}" for heading, cell in zip(_HEADINGS[1:], row[1:], strict=True) if cell]
    return "\n".join([row[0], *values])


def _delay(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.1f} ms"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

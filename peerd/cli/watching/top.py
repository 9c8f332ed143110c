"""`peerd top`: the swarm as the daemon on this machine sees it, drawn again and again until it is stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peerd.api.coverage import missing_of, needs
from peerd.cli.console import printable, short, write
from peerd.cli.watching.asking import ask_daemon
from peerd.cli.watching.status import duration
from peerd.local.socket_path import default_socket_path
from peerd.protocol.errors import InvalidRequest, Unresponsive

# In a pipe there is no width to fit.
_PLAIN_COLUMNS = 120
_WIDEST_BAR = 100
# By the least number of servers of the blocks in a cell, which a terminal without colours shows by its shape.
_CELLS = {0: ("·", "red"), 1: ("▄", "yellow"), 2: ("█", "green")}
_LEVELS = "▁▂▃▄▅▆▇█"
_COLUMNS = ("peer", "blocks", "speed", "free KV", "delay", "way", "seen for", "")
_RIGHT = ("speed", "free KV", "delay", "seen for")


async def show_top(socket_path: Path | None, *, every_s: float) -> None:
    """Draw the swarm each `every_s` until cancelled; once, as text, where standard output is no terminal.

    A daemon that stops answering meanwhile is waited for. Raises InvalidRequest, Unresponsive if it does not at first.
    """
    path = socket_path or default_socket_path()
    found = await _ask(path)
    if not sys.stdout.isatty():
        write(as_text(*found, time.time()))
        return
    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        trouble = ""
        while True:
            view = view_of(*found, time.time(), width=console.width, height=console.height - 1, trouble=trouble)
            live.update(view, refresh=True)
            await trio.sleep(every_s)
            try:
                found, trouble = await _ask(path), ""
            except (InvalidRequest, Unresponsive) as error:
                trouble = str(error)


async def _ask(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return await ask_daemon(path, "/peerd/v1/swarm"), await ask_daemon(path, "/peerd/v1/status")


def as_text(swarm: Mapping[str, Any], status: Mapping[str, Any], now: float) -> str:
    """The view without colours. `now`: unix seconds."""
    lines = StringIO()
    console = Console(file=lines, width=_PLAIN_COLUMNS, color_system=None, highlight=False)
    console.print(view_of(swarm, status, now, width=_PLAIN_COLUMNS, height=None))
    return "\n".join(line.rstrip() for line in lines.getvalue().splitlines()) + "\n"


def view_of(
    swarm: Mapping[str, Any],
    status: Mapping[str, Any],
    now: float,
    *,
    width: int,
    height: int | None,
    trouble: str = "",
) -> RenderableType:
    """What is drawn. now: unix seconds. height: the most lines it may have; None for any. trouble: why the figures are
    old, if they are.
    """
    parts: list[RenderableType] = [_header(status)]
    if trouble:
        parts.append(Text(printable(trouble), style="bold red"))
    parts.append(_hour(swarm["history"], width))
    models = swarm["models"]
    # Each model has three lines and a heading of its table; the rest is for servers.
    rows = None if height is None else max(1, (height - len(parts)) // max(1, len(models)) - 5)
    for model in models:
        parts += ["", _verdict(model), _bar(model, width), _servers(model["servers"], now, rows)]
    if not models:
        parts.append("This daemon offers no model: start it with --model.")
    return Group(*parts)


def _header(status: Mapping[str, Any]) -> Text:
    parts = [
        f"peerd {status['version']}",
        short(status["peer_id"]),
        f"up {duration(status['uptime_s'])}",
        f"reach {status['reachability']['state']}",
        _count(len(status["peers"]), "peer"),
        _count(status.get("answering", 0), "answer"),
    ]
    if status["serving"]:
        spans = ", ".join(served["blocks"] for served in status["serving"])
        parts.append(f"serves {spans} to {_count(status['sessions'], 'session')}")
    return Text(printable("   ".join(parts)), style="bold", overflow="ellipsis", no_wrap=True)


def _hour(history: Sequence[Mapping[str, Any]], width: int) -> Text:
    """The tokens of each minute of the last hour, as a line of bars."""
    values = [sample["tokens"] for sample in history][-max(1, width - 40) :]
    most = max(values, default=0)
    bars = "".join(_LEVELS[value * (len(_LEVELS) - 1) // most] if most else _LEVELS[0] for value in values)
    words = f"{values[-1]} in the last one, at most {most}" if values else "none yet"
    return Text(f"tokens a minute: {words}  {bars}", overflow="ellipsis", no_wrap=True)


def _verdict(model: Mapping[str, Any]) -> Text:
    runs = [(run["start"], run["end"], run["servers"]) for run in model["coverage"]]
    single = ", ".join(f"{start}:{end}" for start, end, servers in runs if servers == 1)
    text = Text(printable(model["name"]), style="bold")
    if missing := missing_of(runs):
        return text.append(f" {needs(missing)}", "bold red")
    text.append(f": {_count(model['server_count'], 'server')}, ")
    if single:
        return text.append(f"one alone has each of blocks {single}", "yellow")
    return text.append("each block has two or more", "green")


def _bar(model: Mapping[str, Any], width: int) -> Text:
    """A cell for each block, or for some if there are more blocks than columns."""
    owners = [run["servers"] for run in model["coverage"] for _ in range(run["start"], run["end"])]
    cells = min(len(owners), width - 2, _WIDEST_BAR)
    text = Text()
    for cell in range(cells):
        least = min(owners[cell * len(owners) // cells : (cell + 1) * len(owners) // cells])
        text.append(*_CELLS[min(2, least)])
    return text


def _servers(servers: Sequence[Mapping[str, Any]], now: float, most: int | None) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _RIGHT else "left", no_wrap=True)
    shown = servers if most is None or len(servers) <= most else servers[: max(1, most - 1)]
    for server in shown:
        table.add_row(*map(printable, _row(server, now)), style=None if server["state"] == "online" else "dim")
    if len(shown) == len(servers):
        return table
    return Group(table, Text(f"and {len(servers) - len(shown)} more: peerd peers lists them", style="dim"))


def _row(server: Mapping[str, Any], now: float) -> Iterable[str]:
    rtt_ms = server["rtt_ms"]
    return (
        "this peer" if server["is_us"] else short(server["peer_id"]),
        f"{server['start']}:{server['end']}",
        f"{server['positions_a_second']:g}/s",
        str(server["free_tokens"]),
        "" if rtt_ms is None else f"{rtt_ms:.1f} ms",
        server["way"] or "not connected",
        duration(max(0.0, now - server["seen_since"])),
        "" if server["state"] == "online" else server["state"],
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

"""`peerd status`: asks the daemon on this machine for its status, and prints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peerd.api.coverage import needs
from peerd.cli.console import printable, short, table, write
from peerd.cli.watching.asking import ask_daemon
from peerd.local.socket_path import default_socket_path
from peerd.protocol.errors import NoChain
from peerd.protocol.span import Span


async def show_status(socket_path: Path | None, *, as_json: bool) -> None:
    """Print the daemon's status.

    Raises InvalidRequest if none listens, and Unresponsive if it does not answer; NoChain, after printing, if blocks of
    its models have no server.
    """
    status = await ask_daemon(socket_path or default_socket_path(), "/peerd/v1/status")
    write((json.dumps(status, indent=2) if as_json else describe(status)) + "\n")
    if lacking := [f"{model['name']} {lacks(model)}" for model in status["models"] if not model["covered"]]:
        raise NoChain("; ".join(lacking))


def lacks(model: dict[str, Any]) -> str:
    """What a model of the status lacks: `needs 3 more blocks: 40-42`."""
    spans = [Span.parse(run["blocks"]) for run in model["coverage"] if not run["servers"]]
    return needs([(span.start, span.end) for span in spans])


def describe(status: dict[str, Any]) -> str:
    """The status as text for people."""
    lines = [
        f"peer      {status['peer_id']}",
        f"version   {status['version']}, up {duration(status['uptime_s'])}",
        *(f"address   {address}" for address in status["addresses"]),
        f"reach     {_reach(status['reachability'])}",
    ]
    lines += [f"relayed   by {short(relay['peer_id'])}" for relay in status["relayed_by"]]
    if (relaying := status["relaying"]) is not None:
        lines.append(
            f"relaying  for {relaying['slots']} of {relaying['max_slots']} peers,"
            f" {relaying['circuits']} of {relaying['max_circuits']} connections,"
            f" {relaying['passed_bytes'] / 2**20:.1f} MiB passed on"
        )
    for served in status["serving"]:
        used = served["total_tokens"] - served["free_tokens"]
        lines.append(
            f"serving   blocks {served['blocks']}, {used} of {served['total_tokens']} KV tokens in use,"
            f" {served['positions_computed']} positions computed"
        )
    if status["serving"]:
        lines.append(f"sessions  {status['sessions']}")
    for model in status["models"]:
        runs = ", ".join(f"{run['blocks']} by {run['servers'] or 'no server'}" for run in model["coverage"])
        state = "complete" if model["covered"] else "incomplete"
        lines.append(f"model     {model['name']}: {state}, {_count(model['servers'], 'server')} ({runs})")
        if (audits := model["audits"]) is not None:
            lines.append(f"audits    {_audits(audits)}")
    lines += [f"refused   {_refused(score)}" for score in status["refused"]]
    lines += [f"avoided   {short(one['peer_id'])} {_avoided(one)}" for one in status["avoided"]]
    lines += [f"convicted {short(one['peer_id'])} {_convicted(one)}" for one in status["convicted"]]
    rows = [(short(peer["peer_id"]), _rtt(peer["rtt_ms"]), _way(peer)) for peer in status["peers"]]
    return "\n".join(lines) + f"\n\n{_count(len(rows), 'peer')} connected" + (f"\n{table(rows)}" if rows else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _reach(reachability: dict[str, Any]) -> str:
    seen_at = ", ".join(reachability["seen_at"])
    words = [reachability["state"], f", seen at {seen_at}" if seen_at else ""]
    return "".join(words) + (f": {reachability['why']}" if reachability["why"] else "")


def _refused(score: dict[str, Any]) -> str:
    """What a peer or an address did wrong lately."""
    name = short(score["name"]) if score["name"].startswith("12D3") else score["name"]
    ban = f"for {duration(score['banned_s'])}" if score["banned_s"] else "not yet"
    reasons = ", ".join(f"{reason} ({count}x)" for reason, count in score["reasons"].items())
    return printable(f"{name} {ban}, score {score['score']:.0f} of 100: {reasons}")


def _avoided(one: dict[str, Any]) -> str:
    """For how long we use a peer for nothing, and why."""
    until = f"for {duration(one['for_s'])}" if one["for_s"] else "until it answers"
    return printable(" ".join(f"{until}: {one['why']}".split()) if one["why"] else until)


def _convicted(one: dict[str, Any]) -> str:
    """For how long we avoid a peer that computed something else than others, and what the audit found."""
    return printable(f"for {duration(one['ends_in_s'])}, {one['count']}x: {one['why']}")


def _audits(audits: dict[str, Any]) -> str:
    answers, hops = (_ends(audits[which]) for which in ("counts", "hop_counts"))
    return f"1 answer in {1 / audits['probability']:g}{answers}; each hop as often{hops}"


def _ends(counts: dict[str, int]) -> str:
    ends = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f": {ends}" if ends else ", none so far"


def _rtt(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.1f} ms"


def _way(peer: dict[str, Any]) -> str:
    """How the bytes reach a peer."""
    relay = peer["relay"]
    return str(peer["way"]) if relay is None else f"relayed by {short(relay)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

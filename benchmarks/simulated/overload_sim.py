"""Simulates fifty clients and two servers with room for eight: how long do clients wait, and how often do they ask?

    python -m benchmarks.simulated.overload_sim [--clients 50] [--servers 2] [--slots 4] [--later 20]
        [--json] [--output FILE]

Prints a table, or JSON. Time is simulated (overload_swarm.py).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

from benchmarks.simulated.overload_swarm import Overload, OverloadPlan


def run(plan: OverloadPlan) -> Overload:
    """Run a plan in virtual time."""
    overload = Overload(plan)
    trio.run(overload.run, clock=MockClock(autojump_threshold=0))
    return overload


def figures_of(overload: Overload) -> dict[str, Any]:
    """Return the figures of a finished run."""
    waits = sorted(answer.opened_s - answer.wanted_s for answer in overload.answers if answer.error is None)
    opens = sorted(overload.opens_a_minute().values())
    split = overload.split()
    return {
        "answers": len(overload.answers),
        "errors": sum(answer.error is not None for answer in overload.answers),
        "took_s": round(overload.took_s, 2),
        "ideal_s": round(overload.plan.ideal_s, 2),
        "waited_s": {"p50": waits[len(waits) // 2], "longest": waits[-1]} if waits else {},
        "opens_a_client_and_minute": {"mean": sum(opens) / len(opens), "most": opens[-1]},
        "servers": [
            {
                "came_s": serving.came_s,
                "sessions": split[str(serving.identity.peer_id)],
                "opens": len(serving.opens),
                "announcements": len(serving.announced),
            }
            for serving in overload.serving
        ],
    }


def as_table(figures: dict[str, Any]) -> str:
    """Format the figures as a table."""
    waited, opens = figures["waited_s"], figures["opens_a_client_and_minute"]
    lines = [
        f"{figures['answers']} answers, {figures['errors']} errors, in {figures['took_s']:.1f} s;"
        f" no slot empty for a moment: {figures['ideal_s']:.1f} s",
        f"waited for a server: {waited['p50']:.1f} s in the middle, {waited['longest']:.1f} s at most",
        f"asked in a minute: {opens['mean']:.1f} times a client, {opens['most']} at most",
        "",
        f"{'server since':>14}{'sessions':>12}{'asked':>10}{'announced':>12}",
    ]
    for server in figures["servers"]:
        lines.append(
            f"{server['came_s']:12.1f} s{server['sessions']:12}{server['opens']:10}{server['announcements']:12}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate more clients than servers have room for.")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4, help="sessions that a server has room for")
    parser.add_argument("--answers", type=int, default=2, help="sessions of each client, one after the other")
    parser.add_argument("--later", type=float, nargs="*", default=(), help="seconds until further servers come")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    asked = parser.parse_args()
    plan = OverloadPlan(asked.clients, asked.servers, asked.slots, asked.answers, later=tuple(asked.later))
    began = time.monotonic()
    figures = figures_of(run(plan))
    text = json.dumps(figures, indent=1)
    if asked.output:
        asked.output.write_text(text + "\n")
    print(text if asked.json else f"{as_table(figures)}\n\nsimulated in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

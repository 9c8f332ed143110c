"""Simulates a thousand DHT peers under churn: do lookups find the live servers, how fast, and what does each peer pay?

    python -m benchmarks.simulated.dht_sim [--peers 1000] [--hours 1] [--churn 0.3] [--one-shard] [--json]
        [--output FILE]

Prints a table, or JSON. Time is virtual. The result depends only on the seed, apart from the order in which Trio runs
tasks that wake at the same moment. The machine's speed only decides how long the simulation takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

from benchmarks.simulated.dht_swarm import MODELS, ONE_SHARD, Lookup, Swarm, SwarmPlan


def quantile(values: list[float], share: float) -> float:
    """Return the smallest value such that this share of all values is no greater."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def of_lookups(lookups: list[Lookup]) -> dict[str, Any]:
    """Return the figures of all lookups of one kind."""
    expected = sum(one.found.expected for one in lookups)
    figures: dict[str, Any] = {
        "lookups": len(lookups),
        "records_expected": expected,
        "records_missing": sum(one.found.missing for one in lookups),
        "found_percent": round(100 * (1 - sum(one.found.missing for one in lookups) / max(1, expected)), 4),
        "gone_but_shown": sum(one.found.ghosts for one in lookups),
        "gone_too_long_but_shown": sum(one.found.forbidden for one in lookups),
    }
    for name in ("hops", "requests", "seconds"):
        values = [float(getattr(one, name)) for one in lookups]
        figures |= {f"{name}_p50": round(quantile(values, 0.5), 3), f"{name}_p99": round(quantile(values, 0.99), 3)}
    return figures


def simulate(plan: SwarmPlan) -> dict[str, Any]:
    """Run a plan and return its figures."""
    swarm = Swarm(plan)
    began = time.monotonic()
    trio.run(swarm.run, clock=MockClock(autojump_threshold=0))
    return {
        "peers": plan.peers,
        "servers": sum(member.span is not None for member in swarm.members.values()),
        "hours": plan.hours,
        "replaced": len(swarm.gone),
        "servers_of_a_shard": of_lookups([one for one in swarm.lookups if not one.found.of_addresses]),
        "addresses_of_a_server": of_lookups([one for one in swarm.lookups if one.found.of_addresses]),
        "bytes_an_hour": {
            "a server": dict(swarm.bytes_an_hour(serving=True)),
            "a helper": dict(swarm.bytes_an_hour(serving=False)),
            "a client": dict(swarm.bytes_an_hour(serving=None)),
        },
        "contacts": round(swarm.table_size(), 1),
        "lively_contacts_percent": [round(100 * share, 2) for share in swarm.lively_contacts],
        "took_s": round(time.monotonic() - began, 1),
    }


def as_table(figures: dict[str, Any]) -> str:
    """Format the figures as a table."""
    lines = [
        f"{figures['peers']} peers, {figures['servers']} of them serving, {figures['hours']:g} h,"
        f" {figures['replaced']} replaced; simulated in {figures['took_s']:.0f} s",
        "",
        f"{'lookups of':24}{'count':>8}{'found':>10}{'hops':>10}{'requests':>12}{'seconds':>14}{'ghosts':>8}"
        f"{'too old':>9}",
    ]
    for name in ("servers_of_a_shard", "addresses_of_a_server"):
        f = figures[name]
        lines.append(
            f"{name.replace('_', ' '):24}{f['lookups']:8}{f['found_percent']:9g}%"
            f"{f['hops_p50']:5g} /{f['hops_p99']:3g}{f['requests_p50']:6g} /{f['requests_p99']:4g}"
            f"{f['seconds_p50']:7.2f} /{f['seconds_p99']:5.2f}{f['gone_but_shown']:8}{f['gone_too_long_but_shown']:9}"
        )
    lines += ["", "pairs are p50 / p99; ghosts are servers that crashed within the last minute", ""]
    kinds = sorted({kind for counts in figures["bytes_an_hour"].values() for kind in counts})
    lines.append(f"{'MB an hour, both ways':24}" + "".join(f"{kind:>13}" for kind in (*kinds, "all")))
    for role, counts in figures["bytes_an_hour"].items():
        cells = [counts.get(kind, 0) for kind in kinds]
        lines.append(f"{role:24}" + "".join(f"{count / 1e6:13.3f}" for count in (*cells, sum(cells))))
    lively = figures["lively_contacts_percent"]
    lines += ["", f"{figures['contacts']:g} contacts a table, of which {min(lively):g}-{max(lively):g} % live"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate a swarm's DHT under churn.")
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--serving", type=float, help="share of the peers that serve (default 0.5; all on one shard)")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--hours", type=float, default=1.0, help="of virtual time")
    parser.add_argument("--churn", type=float, default=0.3, help="share of the peers replaced in an hour")
    parser.add_argument("--loss", type=float, default=0.01, help="share of questions, and of answers, that are lost")
    parser.add_argument("--one-shard", action="store_true", help="every server on one key, which then splits")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    asked = parser.parse_args()
    plan = SwarmPlan(
        peers=asked.peers,
        serving=(1.0 if asked.one_shard else 0.5) if asked.serving is None else asked.serving,
        clients=asked.clients,
        hours=asked.hours,
        churn=asked.churn,
        loss=asked.loss,
        models=ONE_SHARD if asked.one_shard else MODELS,
        seed=asked.seed,
    )
    figures = simulate(plan)
    text = json.dumps(figures, indent=1)
    if asked.output:
        asked.output.write_text(text + "\n")
    print(text if asked.json else as_table(figures))
    lost = figures["servers_of_a_shard"]["records_missing"] + figures["addresses_of_a_server"]["records_missing"]
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()

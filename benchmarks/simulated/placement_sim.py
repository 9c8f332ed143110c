"""Simulates whole swarms of servers that choose their blocks with a daemon's own code: how well do they choose?

    make bench-placement                      # a quarter of an hour on one core
    python -m benchmarks.simulated.placement_sim --servers 50 200

Prints for each swarm: when every block had a server for the first time, and for which part of the time after that; what
the swarm carried, as a share of the most that its servers could carry in any placement (an upper bound, so the true
share is better); how often a server moved; and how many moves took away a block's last server, which must be none.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
from dataclasses import dataclass, replace
from random import Random

import trio
from trio.testing import MockClock

from benchmarks.simulated.placement_swarm import Swarm
from benchmarks.simulated.placement_world import World, fake_record
from peerd.protocol.identity import Identity
from peerd.protocol.span import Span
from peerd.routing.directory.holding import Holding
from peerd.routing.placement.flow import swarm_flow
from peerd.routing.placement.placement import Newcomer, choose_first_span, choose_move

HOURS = 2.0
# Samples count from here on: by then every server has chosen and loaded its blocks.
SETTLED_S = 1200.0

SCENARIOS = {
    "they come within 10 min, and stay": World(0, 0, 0),
    "all start in the same second": World(0, 0, 0, join_s=1.0),
    "30 % an hour leave or crash": World(0, 0, 0, churn_an_hour=0.3),
    "a quarter is struck half way": World(0, 0, 0, strike_s=0.0),
}
# For each swarm size: the model's blocks, and the median number of blocks that fit on a server. A block has about five
# servers in a swarm of 50, and a hundred in one of 1,000.
MODELS = {50: (32, 3.0), 200: (80, 4.0), 1000: (80, 6.0)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of one swarm. Shares are of the most that its servers could carry."""

    first_covered_s: float
    covered: float
    of_present: float
    of_serving: float
    least: float
    moves_an_hour: float
    last_hour_moves_an_hour: float
    recovered_s: float | None
    careless: int
    unlucky: int
    wall_s: float


def simulate(world: World, *, hours: float = HOURS, seed: int = 1) -> Outcome:
    """Simulate one swarm."""
    began = time.perf_counter()
    swarm = Swarm(world, seed)
    trio.run(swarm.run, hours, clock=MockClock(autojump_threshold=0))
    settled = [sample for sample in swarm.samples if sample.time_s > min(SETTLED_S, hours * 1800)]
    struck = [sample for sample in swarm.samples if sample.time_s > world.strike_s]
    whole = next((sample.time_s for sample in struck if not sample.gaps and sample.of_present > 0.9), None)
    late = [sample for sample in settled if sample.time_s > (hours - 1) * 3600] or settled
    return Outcome(
        first_covered_s=swarm.covered_s if swarm.covered_s is not None else float("inf"),
        covered=statistics.mean(not sample.gaps for sample in settled),
        of_present=statistics.mean(sample.of_present for sample in settled),
        of_serving=statistics.mean(sample.of_serving for sample in settled),
        least=min(sample.of_present for sample in settled),
        moves_an_hour=swarm.moves / world.servers / hours,
        last_hour_moves_an_hour=(late[-1].moves - late[0].moves) / world.servers,
        recovered_s=whole - world.strike_s if whole is not None else None,
        careless=swarm.careless,
        unlucky=swarm.unlucky,
        wall_s=time.perf_counter() - began,
    )


def against_the_best(seed: int, *, servers: int = 5, blocks: int = 6) -> float:
    """Compare what a small swarm carries in the end with the best of all placements, which are tried one by one."""
    random = Random(seed)
    sizes = [random.randint(2, 4) for _ in range(servers)]
    speeds = [random.uniform(100, 1000) for _ in range(servers)]
    holdings: list[Holding] = []
    for number in range(servers):
        own = Identity.from_seed(number.to_bytes(32, "big")).peer_id
        span = choose_first_span(holdings, Newcomer(own, 0), blocks, sizes[number])
        record = replace(fake_record(1), span=span, state="online", throughput=speeds[number])
        holdings.append(Holding(own, record))
    for _ in range(20):
        for number, one in enumerate(holdings):
            if (better := choose_move(holdings, one, blocks)) is not None:
                holdings[number] = Holding(one.peer_id, replace(one.record, span=better))
    places = itertools.product(*(range(blocks - size + 1) for size in sizes))
    best = max(
        swarm_flow([(Span(at, at + size), speed) for at, size, speed in zip(place, sizes, speeds, strict=True)], blocks)
        for place in places
    )
    return swarm_flow([(one.record.span, one.record.throughput) for one in holdings], blocks) / best


def _print(name: str, outcome: Outcome) -> None:
    print(
        f"  {name:<36} {outcome.first_covered_s:>7.0f} {outcome.covered:>8.1%} {outcome.of_present:>8.1%}"
        f" {outcome.of_serving:>8.1%} {outcome.least:>7.1%} {outcome.moves_an_hour:>7.2f}"
        f" {outcome.last_hour_moves_an_hour:>9.2f} {outcome.careless:>5} {outcome.unlucky:>5} {outcome.wall_s:>6.0f}"
        + (f"   whole again after {outcome.recovered_s:.0f} s" if outcome.recovered_s is not None else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--hours", type=float, default=HOURS)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # A thousand servers would log where they move.
    logging.disable(logging.WARNING)
    shares = [against_the_best(seed) for seed in range(40)]
    print("5 servers on 6 blocks, 40 swarms, beside the best of all placements: ", end="")
    print(f"mean {statistics.mean(shares):.1%}, least {min(shares):.1%}")
    for servers in options.servers:
        blocks, size = MODELS.get(servers, (80, max(2.0, 400 / servers)))
        print(f"\n{servers} servers, {blocks} blocks, {size:g} fit in the middle; {options.hours:g} h")
        print(
            f"  {'':<36} {'first':>7} {'covered':>8} {'share of':>8} {'share of':>8} {'least':>7} {'moves/':>7}"
            f" {'last hour':>9} {'took last':>11} {'wall':>6}\n  {'':<36} {'whole s':>7} {'':>8} {'present':>8}"
            f" {'serving':>8} {'share':>7} {'peer h':>7} {'':>9} {'owner/ghost':>11} {'s':>6}"
        )
        for name, scenario in SCENARIOS.items():
            strike_s = options.hours * 1800 if scenario.strike_s == 0 else scenario.strike_s
            world = replace(scenario, servers=servers, blocks=blocks, size=size, strike_s=strike_s)
            _print(name, simulate(world, hours=options.hours, seed=options.seed))


if __name__ == "__main__":
    main()

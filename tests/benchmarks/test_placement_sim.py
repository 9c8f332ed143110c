"""Swarms of servers that place themselves: the benchmark's, small."""

from __future__ import annotations

import logging

import pytest
import trio

from benchmarks.simulated.placement_sim import against_the_best, simulate
from benchmarks.simulated.placement_swarm import Server, Swarm, most_flow
from benchmarks.simulated.placement_world import World
from peerd.protocol.span import Span
from peerd.routing.placement.flow import swarm_flow


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


async def test_servers_that_start_in_the_same_second_share_the_model_before_anything_is_loaded() -> None:
    # No server gets as far as loading.
    swarm = Swarm(World(servers=20, blocks=30, size=6, spread=0, join_s=1, fetch_s=1e6))
    await swarm.run(0.02)
    decided = [next(iter(server.slots)).intention() for server in swarm.servers.values()]
    assert [record.slot for record in decided if record] == [0] * 20, "all have decided"
    owners = [0] * 30
    for record in decided:
        assert record is not None
        for block in range(record.span.start, record.span.end):
            owners[block] += 1
    assert min(owners) >= 3
    assert max(owners) <= 5


async def test_a_lone_server_decides_within_seconds() -> None:
    swarm = Swarm(World(servers=1, blocks=30, size=6, join_s=0, fetch_s=1e6))
    with trio.move_on_after(10):
        await swarm.run(1)
    (server,) = swarm.servers.values()
    (record,) = server.slots.records()
    assert record.slot == 0


@pytest.mark.parametrize("seed", range(2))
def test_a_swarm_under_churn_carries_what_it_can_and_uncovers_nothing(seed: int) -> None:
    outcome = simulate(World(servers=30, blocks=16, size=3, churn_an_hour=0.3), hours=1.5, seed=seed)
    assert outcome.first_covered_s < 600
    assert outcome.covered > 0.97
    assert outcome.of_present > 0.92
    assert outcome.moves_an_hour < 1
    assert outcome.careless == 0


def test_a_swarm_that_nobody_leaves_comes_to_rest_near_the_best_there_is() -> None:
    outcome = simulate(World(servers=30, blocks=16, size=3), hours=2)
    assert outcome.of_present > 0.95
    assert outcome.last_hour_moves_an_hour < 0.05
    assert outcome.careless == 0


def test_after_a_quarter_is_struck_the_others_close_the_gaps_without_opening_any() -> None:
    outcome = simulate(World(servers=30, blocks=16, size=3, strike_s=1800), hours=1)
    assert outcome.recovered_s is not None
    assert outcome.recovered_s < 900
    assert outcome.moves_an_hour < 2
    assert outcome.careless == 0


async def test_a_move_that_takes_a_blocks_last_owner_away_is_noticed() -> None:
    swarm = Swarm(World(servers=3, blocks=8, size=4))
    servers = swarm.servers
    for number, held in enumerate((Span(0, 4), Span(4, 8), Span(2, 8))):
        servers[number] = Server(swarm, number)
        servers[number].held = held
    swarm.check_stays_covered(servers[1], Span(4, 8))
    assert (swarm.careless, swarm.unlucky) == (0, 0)
    servers[2].leaving = True
    swarm.check_stays_covered(servers[1], Span(4, 8))
    assert (swarm.careless, swarm.unlucky) == (1, 0)
    swarm.crashed(servers.pop(2))
    swarm.check_stays_covered(servers[1], Span(4, 8))
    assert (swarm.careless, swarm.unlucky) == (1, 1), "it could not be seen yet"


def test_small_swarms_end_near_the_best_of_all_placements() -> None:
    shares = [against_the_best(seed) for seed in range(8)]
    assert sum(shares) / len(shares) > 0.95


def test_the_bound_is_never_below_what_a_swarm_carries() -> None:
    servers = [(Span(0, 4), 100.0), (Span(2, 6), 50.0), (Span(4, 6), 900.0)]
    sizes = [(len(span), rate) for span, rate in servers]
    assert most_flow(sizes, 6) >= swarm_flow(servers, 6)
    # The fast one has two blocks only: the rest bounds all.
    assert most_flow(sizes, 6) == pytest.approx(150 / 4)

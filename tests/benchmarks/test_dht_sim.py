"""The DHT under churn, small enough for every day; `make bench-dht` has the thousand peers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from benchmarks.simulated import dht_sim
from benchmarks.simulated.dht_swarm import Swarm, SwarmPlan
from peerd.routing.dht.record_sets import newest

# An hour of 100 peers, three in ten of them replaced, as the figures of `make bench-dht` are taken.
PLAN = SwarmPlan(peers=100, serving=0.07, clients=5, hours=1.0, joins_a_second=5.0)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return dht_sim.simulate(PLAN)


@pytest.mark.parametrize("kind", ["servers_of_a_shard", "addresses_of_a_server"])
def test_through_an_hour_of_churn_every_live_server_is_found(figures: dict[str, Any], kind: str) -> None:
    # Of 100 peers 30 are to be replaced in the hour, give or take twice the root of that.
    assert figures["replaced"] > 18
    assert figures[kind]["lookups"] > 180
    assert figures[kind]["records_expected"] >= figures[kind]["lookups"]
    assert figures[kind]["records_missing"] == 0


def test_lookups_find_no_peer_that_left_or_crashed_longer_ago_than_a_record_lives(figures: dict[str, Any]) -> None:
    assert figures["servers_of_a_shard"]["gone_too_long_but_shown"] == 0


def test_a_lookup_takes_three_hops_and_about_a_second_at_most(figures: dict[str, Any]) -> None:
    found = figures["servers_of_a_shard"]
    assert found["hops_p99"] <= 4
    assert found["seconds_p50"] < 0.7
    # One dead peer among the last that are asked costs a second, and a dial four round trips.
    assert found["seconds_p99"] < 2.5


def test_a_server_pays_what_its_renewals_must_cost(figures: dict[str, Any]) -> None:
    # 180 an hour to 12 holders and one question beside, 1.1 to 2 kB each both ways; with it its share of what others
    # store here and look up.
    assert sum(figures["bytes_an_hour"]["a server"].values()) < 12e6
    assert sum(figures["bytes_an_hour"]["a helper"].values()) < 4e6


def test_tables_hold_few_that_are_gone(figures: dict[str, Any]) -> None:
    # Those that left in the last quarter of an hour, and were not met since.
    assert min(figures["lively_contacts_percent"]) > 90


def test_the_table_and_the_json_say_the_same(figures: dict[str, Any]) -> None:
    table = dht_sim.as_table(json.loads(json.dumps(figures)))
    assert "100 peers" in table
    assert "100%" in table


def test_a_simulation_that_forgets_records_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    # What this file asserts can fail: here every lookup loses what it found.
    async def lose(self: object, wanted: object) -> list[Any]:
        await trio.lowlevel.checkpoint()
        return newest([])

    monkeypatch.setattr("peerd.routing.dht.dht.Dht.get", lose)
    swarm = Swarm(SwarmPlan(peers=5, serving=1.0, clients=1, hours=0.1))
    trio.run(swarm.run, clock=MockClock(autojump_threshold=0))
    assert all(lookup.found.missing for lookup in swarm.lookups)

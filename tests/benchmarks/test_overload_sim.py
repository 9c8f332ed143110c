"""Overload in virtual time: clients wait in turn, spread over servers, and finish; servers are neither flooded nor
idle.
"""

from __future__ import annotations

import pytest

from benchmarks.simulated.overload_sim import as_table, figures_of, run
from benchmarks.simulated.overload_swarm import Overload, OverloadPlan
from peerd.protocol.errors import NoRoom


@pytest.fixture(scope="module")
def fifty() -> Overload:
    """50 clients, 2 servers with room for 4 sessions each; every client asks twice."""
    return run(OverloadPlan())


def test_every_client_gets_every_answer(fifty: Overload) -> None:
    assert len(fifty.answers) == 100
    assert [answer.error for answer in fifty.answers if answer.error is not None] == []


def test_hardly_a_slot_is_empty_while_a_client_waits(fifty: Overload) -> None:
    assert fifty.took_s < 1.4 * fifty.plan.ideal_s


def test_nobody_asks_oftener_than_patience_needs(fifty: Overload) -> None:
    opens = fifty.opens_a_minute()
    assert len(opens) == 50
    # Two sessions, each refused by both servers at first and then in a queue.
    assert max(opens.values()) <= 8
    assert sum(opens.values()) <= 5 * 50


def test_clients_spread_over_the_servers(fifty: Overload) -> None:
    split = fifty.split()
    assert len(split) == 2
    # Both are full but for the end, when one queue is empty before the other.
    assert min(split.values()) >= 0.35 * sum(split.values())


def test_nobody_waits_for_several_times_its_turn(fifty: Overload) -> None:
    waits = sorted(answer.opened_s - answer.wanted_s for answer in fifty.answers)
    # In an ideal queue the last of the first round waits for half of it all.
    assert waits[-1] < 1.2 * fifty.plan.ideal_s


def test_a_full_server_says_so_and_says_when_it_has_room_again(fifty: Overload) -> None:
    for serving in fifty.serving:
        said = [record.free_tokens for record in serving.announced]
        assert said[0] > 0
        assert 0 in said
        # It does not tell of every session that comes or goes: 50 sessions in 47 s.
        assert len(said) <= 10


def test_a_server_that_joins_meanwhile_takes_its_share() -> None:
    overload = run(OverloadPlan(clients=30, answers=2, later=(8.0,)))
    assert all(answer.error is None for answer in overload.answers)
    newcomer = overload.serving[-1]
    first_s = min(at for at, _ in newcomer.opens)
    # Announced and found: used within 5 s by clients that were already waiting.
    assert first_s - newcomer.came_s < 5.0
    assert overload.split()[str(newcomer.identity.peer_id)] >= 6


def test_when_no_room_comes_a_client_hears_so_once_its_patience_ends() -> None:
    # Two get the only slots and keep using them for minutes; a slot that is unused for 15 s goes to a waiting client.
    overload = run(OverloadPlan(clients=8, slots=1, answers=1, steps=5, pause_s=10.0, busy_s=20.0))
    failed = [answer for answer in overload.answers if answer.error is not None]
    assert len(failed) == 6
    for answer in failed:
        assert type(answer.error) is NoRoom
        assert "all servers of blocks 0:4 are full: asked" in str(answer.error)
        assert 20 <= answer.ended_s - answer.wanted_s < 26
    assert max(overload.opens_a_minute().values()) <= 8


def test_the_table_says_what_was_measured(fifty: Overload) -> None:
    table = as_table(figures_of(fifty))
    assert "100 answers, 0 errors" in table

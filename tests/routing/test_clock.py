from __future__ import annotations

import pytest

from peerd.protocol.identity import PeerId
from peerd.routing.clock import MAX_CORRECTION_S, MAX_PEERS, SwarmClock


@pytest.fixture
def clock() -> SwarmClock:
    return SwarmClock(lambda: 1000.0)


def test_the_swarms_time_is_the_median_of_all_clocks(clock: SwarmClock) -> None:
    for name, offset_s in (("a", 100.0), ("b", 90.0), ("c", 95.0), ("d", -1e9)):
        clock.observed(PeerId(name), 1000.0 + offset_s)
    assert clock() == 1090.0


def test_no_single_peer_turns_the_clock(clock: SwarmClock) -> None:
    clock.observed(PeerId("liar"), 1e9)
    assert clock() == 1000.0
    clock.observed(PeerId("honest"), 1000.2)
    assert clock() == pytest.approx(1000.2)


def test_a_peer_has_one_vote_however_often_it_is_met(clock: SwarmClock) -> None:
    clock.observed(PeerId("honest"), 1000.0)
    for _ in range(10):
        clock.observed(PeerId("liar"), 1500.0)
    assert clock() == 1000.0


def test_only_the_peers_met_last_count(clock: SwarmClock) -> None:
    for number in range(MAX_PEERS + 1):
        clock.observed(PeerId(str(number)), 1005.0)
    for number in range(MAX_PEERS):
        clock.observed(PeerId(f"later {number}"), 1007.0)
    assert clock() == 1007.0


def test_a_clock_far_off_is_warned_of_once(clock: SwarmClock, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abcdef":
        clock.observed(PeerId(name), 1031.0)
    assert [record.message for record in caplog.records] == ["this machine's clock is 31 s behind the swarm's"]


def test_many_liars_turn_the_clock_by_minutes_at_most(clock: SwarmClock) -> None:
    for number in range(50):
        clock.observed(PeerId(f"liar {number}"), 2e8)
    assert clock() == 1000.0 + MAX_CORRECTION_S

from __future__ import annotations

import pytest

from peerd.protocol.identity import PeerId
from peerd.routing.clock import (
    MAX_CORRECTION_OF_KEPT_S,
    MAX_CORRECTION_S,
    MAX_PEERS,
    MIN_NETWORKS_TO_SET,
    SwarmClock,
    duration,
)


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
    assert [record.message for record in caplog.records][1:] == [
        "this machine's clock is 31 s behind the swarm's, which peerd makes up for: set it (NTP)"
    ]


def test_a_clock_that_nobody_can_judge_is_said_at_once(clock: SwarmClock, caplog: pytest.LogCaptureFixture) -> None:
    clock.observed(PeerId("only"), 1090.0)
    clock.observed(PeerId("only"), 1090.0)
    assert clock() == 1000.0
    [said] = [record.message for record in caplog.records]
    assert said.startswith("this machine's clock is 90 s behind that of only, the only peer that says what time it is")


def test_a_clock_an_hour_off_is_said_where_it_may_not_be_corrected(
    clock: SwarmClock, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abcdef":
        clock.observed(PeerId(name), 1000.0 - 3600)
    assert clock() == 1000.0 - MAX_CORRECTION_S
    assert "is 1 h ahead of the swarm's, more than peerd may make up for" in caplog.text


def test_many_networks_that_agree_set_a_clock_that_nobody_keeps(clock: SwarmClock) -> None:
    for number in range(MIN_NETWORKS_TO_SET):
        clock.observed(PeerId(str(number)), 1000.0 + 3600 + number, f"8.8.{number}.0/24")
    assert clock() == pytest.approx(4600 + 2, abs=1)


def test_networks_that_do_not_agree_set_none(clock: SwarmClock) -> None:
    for number in range(10):
        clock.observed(PeerId(str(number)), 1000.0 + 3600 * (1 + number % 3), f"8.8.{number}.0/24")
    assert clock() == 1000.0 + MAX_CORRECTION_S


def test_one_network_has_one_voice(clock: SwarmClock) -> None:
    for number in range(20):
        clock.observed(PeerId(f"liar {number}"), 1500.0, "6.6.6.0/24")
    for number in range(2):
        clock.observed(PeerId(f"honest {number}"), 1000.0, f"8.8.{number}.0/24")
    assert clock() == 1000.0


def test_a_clock_that_the_system_keeps_is_believed_more_than_peers() -> None:
    kept = SwarmClock(lambda: 1000.0, lambda: True)
    for number in range(20):
        kept.observed(PeerId(str(number)), 5000.0, f"8.8.{number}.0/24")
    assert kept() == 1000.0 + MAX_CORRECTION_OF_KEPT_S


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(31, "31 s"), (-90, "90 s"), (119, "119 s"), (600, "10 min"), (3590, "1 h"), (-7200, "2 h"), (86400 * 3, "3 d")],
)
def test_lengths_of_time_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_many_liars_turn_the_clock_by_minutes_at_most(clock: SwarmClock) -> None:
    for number in range(50):
        clock.observed(PeerId(f"liar {number}"), 2e8)
    assert clock() == 1000.0 + MAX_CORRECTION_S

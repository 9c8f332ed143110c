from __future__ import annotations

import pytest

from peerd.protocol.identity import PeerId
from peerd.routing.links import FIRST_AVOIDANCE_S, MAX_AVOIDANCE_S, MAX_PEERS, Links

A, B = PeerId("a"), PeerId("b")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def links(clock: Clock) -> Links:
    return Links(clock)


def test_a_failed_peer_is_avoided_in_that_instant_and_comes_back_by_itself(links: Links, clock: Clock) -> None:
    links.failed(A)
    assert links.is_avoided(A)
    assert links.avoided() == {A}
    clock.now += FIRST_AVOIDANCE_S
    assert not links.is_avoided(A)
    assert links.avoided() == frozenset()


def test_why_a_peer_is_avoided_is_known_as_long_as_it_is(links: Links, clock: Clock) -> None:
    links.failed(A, "no way there")
    # Who fails again without a word does so for the same reason, as far as we know.
    links.failed(A)
    links.failed(B)
    assert (links.why_avoided(A), links.why_avoided(B), links.why_avoided(PeerId("c"))) == ("no way there", "", "")
    clock.now += FIRST_AVOIDANCE_S
    assert links.why_avoided(A) == ""
    links.failed(A)
    links.succeeded(A)
    links.failed(A)
    assert links.why_avoided(A) == ""


def test_each_failure_in_a_row_is_avoided_for_twice_as_long(links: Links, clock: Clock) -> None:
    delays = []
    for _ in range(10):
        delays.append(links.failed(A))
        clock.now += delays[-1]
    assert delays == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert delays[-1] == MAX_AVOIDANCE_S


def test_requests_that_fail_together_count_once(links: Links, clock: Clock) -> None:
    for _ in range(8):
        links.failed(A)
    clock.now += FIRST_AVOIDANCE_S
    assert not links.is_avoided(A)


def test_a_success_makes_up_for_all_failures(links: Links, clock: Clock) -> None:
    for _ in range(3):
        clock.now += links.failed(A)
    links.failed(A)
    links.succeeded(A)
    assert not links.is_avoided(A)
    assert links.failed(A) == FIRST_AVOIDANCE_S


def test_round_trips_are_smoothed_for_each_peer(links: Links) -> None:
    assert links.rtt_s(A) is None
    links.measured(A, 0.1)
    links.measured(A, 0.9)
    links.measured(B, 0.0)
    assert links.rtt_s(A) == pytest.approx(0.2)
    assert links.rtts_s() == {A: pytest.approx(0.2), B: 0.0}


@pytest.mark.parametrize("rtt_s", [-0.1, float("inf"), float("nan")])
def test_an_impossible_round_trip_is_refused(links: Links, rtt_s: float) -> None:
    with pytest.raises(ValueError, match="round trip"):
        links.measured(A, rtt_s)


def test_made_up_peers_take_bounded_memory(links: Links) -> None:
    for number in range(MAX_PEERS + 10):
        links.measured(PeerId(str(number)), 0.1)
    assert len(links.rtts_s()) == MAX_PEERS

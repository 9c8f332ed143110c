"""What a peer gets for what it gave us."""

from __future__ import annotations

import pytest

from peerd.protocol.identity import PeerId
from peerd.routing.failures.contributions import (
    CREDIT_A_MINUTE,
    FOR_SERVING,
    FOR_SERVING_US,
    HALF_LIFE_S,
    MAX_PEERS,
    SEEN_WITHIN_S,
    SERVED_FOR_S,
    STRANGER,
    Contributions,
)

A, B = PeerId("a"), PeerId("b")


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def serve_us(contributions: Contributions, clock: Clock, minutes: int) -> None:
    for _ in range(minutes):
        for _ in range(100):
            contributions.served_us(A)
        clock.now += 60


def test_a_stranger_weighs_one() -> None:
    assert Contributions(Clock()).weight(A) == STRANGER


def test_minutes_of_service_count_up_to_a_full_credit_and_fade() -> None:
    clock = Clock()
    contributions = Contributions(clock)
    contributions.served_us(A)
    assert contributions.weight(A) == pytest.approx(STRANGER + FOR_SERVING_US * CREDIT_A_MINUTE)
    serve_us(contributions, clock, 60)
    assert contributions.weight(A) == pytest.approx(STRANGER + FOR_SERVING_US, rel=0.01)
    clock.now += HALF_LIFE_S
    assert contributions.weight(A) == pytest.approx(STRANGER + FOR_SERVING_US / 2, rel=0.01)
    assert contributions.weight(B) == STRANGER


def test_blocks_count_once_they_were_seen_for_an_hour() -> None:
    clock = Clock()
    contributions = Contributions(clock)
    contributions.seen_serving(A)
    for _ in range(4):
        assert contributions.weight(A) == STRANGER
        clock.now += SERVED_FOR_S / 4
        contributions.seen_serving(A)
    assert contributions.weight(A) == STRANGER + FOR_SERVING
    clock.now += SEEN_WITHIN_S + 1
    assert contributions.weight(A) == STRANGER
    # A server that was away begins anew.
    contributions.seen_serving(A)
    assert contributions.weight(A) == STRANGER


def test_credits_outlive_a_restart() -> None:
    clock = Clock()
    before, after = Contributions(clock), Contributions(clock)
    serve_us(before, clock, 60)
    before.seen_serving(B)
    after.load(before.dump())
    assert after.weight(A) == pytest.approx(before.weight(A), rel=0.001)
    assert after.weight(B) == STRANGER
    clock.now += 40 * HALF_LIFE_S
    assert after.dump() == "[]\n"


HUGE = f'[["a", 1, {"9" * 400}]]'


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '[["a", 2, 3]]', '[["a", "x", 3]]', "[[1, 0.5, 3]]", HUGE, "[" * 100_000],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text comes from a damaged file
        Contributions(Clock()).load(text)


def test_a_credit_from_the_future_fades_from_now_on() -> None:
    clock = Clock()
    contributions = Contributions(clock)
    contributions.load(f'[["a", 1.0, {clock.now + 1e9}]]')
    clock.now += HALF_LIFE_S
    assert contributions.weight(A) == pytest.approx(STRANGER + FOR_SERVING_US / 2)


def test_made_up_peers_are_remembered_in_a_bounded_number() -> None:
    contributions = Contributions(Clock())
    for number in range(MAX_PEERS + 10):
        contributions.served_us(PeerId(str(number)))
    assert repr(contributions) == f"<Contributions of {MAX_PEERS} peers>"

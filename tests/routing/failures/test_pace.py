"""When a step is late, and which hop holds it up, from numbers alone."""

import pytest

from peerd.protocol.messages.session import Progress
from peerd.routing.failures.pace import CEILING_S, FLOOR_S, UNKNOWN_S, StepPace
from peerd.routing.failures.suspicion import BUSY_FACTOR, UNKNOWN_HOLD_S, Hung, Stuck, Suspicion


def pace_of(*samples: tuple[int, float]) -> StepPace:
    pace = StepPace()
    for positions, seconds in samples:
        pace.took(positions, seconds)
    return pace


def test_nothing_is_known_before_the_first_answer():
    assert StepPace().expected_s(1) is None
    assert StepPace().late_after_s(1) == UNKNOWN_S


def test_a_regular_pace_allows_twice_its_mean_and_an_irregular_one_four_deviations():
    assert pace_of(*[(1, 2.0)] * 50).late_after_s(1) == pytest.approx(4.0, rel=0.01)
    uneven = pace_of(*[(1, 1.0), (1, 5.0)] * 50)
    assert 3 + 4 * 1.8 < uneven.late_after_s(1) < 3 + 4 * 2.6


def test_a_quick_chain_is_allowed_a_hiccup_and_nobody_waits_for_ever_to_ask():
    assert pace_of(*[(1, 0.01)] * 9).late_after_s(1) == FLOOR_S
    slow = pace_of(*[(1, 10.0)] * 9)
    for _ in range(9):
        slow.doubled()
    assert slow.late_after_s(1) == CEILING_S


def test_prompts_and_tokens_have_a_pace_each():
    pace = pace_of(*[(1, 0.5)] * 20, *[(128, 12.8)] * 20)
    assert pace.expected_s(1) == pytest.approx(1.0, rel=0.05)
    assert pace.expected_s(256) == pytest.approx(2 * 25.6, rel=0.05)


def test_where_one_is_unknown_the_other_bounds_it():
    assert pace_of((128, 12.8)).expected_s(1) == pytest.approx(0.3 * 128)
    assert pace_of((1, 0.5)).expected_s(64) == pytest.approx(1.5 * 64)


def test_patience_doubles_until_something_is_answered():
    pace = pace_of(*[(1, 2.0)] * 50)
    once = pace.late_after_s(1)
    pace.doubled()
    assert pace.late_after_s(1) == 2 * once
    pace.took(1, 2.0)
    assert pace.late_after_s(1) == pytest.approx(once, rel=0.01)


# Which hop holds it up.

DONE, HOLDS, LACKS = Progress(7, 7, 50), Progress(7, 6, 50), Progress(6, 6, 50)


def test_the_silent_are_hung_wherever_the_step_is():
    assert Suspicion(7, 0.0).look([HOLDS, None, LACKS, None], 1.0, 0.1) == Hung((1, 3))


def test_a_hop_that_has_the_step_and_ends_no_turn_counts_as_hung():
    suspicion = Suspicion(7, 0.0)
    assert suspicion.look([DONE, HOLDS, LACKS], 1.0, 1.0) is None
    assert suspicion.look([DONE, HOLDS, LACKS], 1.4, 1.0) is None
    assert suspicion.look([DONE, HOLDS, LACKS], 1.5, 1.0) == Hung((1,))


def test_a_hop_that_ends_turns_is_busy_and_gets_longer():
    suspicion = Suspicion(7, 0.0)
    looks = [suspicion.look([DONE, Progress(7, 6, 50 + second), LACKS], float(second), 1.0) for second in range(1, 12)]
    assert looks[: BUSY_FACTOR - 1] == [None] * (BUSY_FACTOR - 1)
    assert looks[BUSY_FACTOR - 1] == Hung((1,))


def test_a_step_that_moves_on_is_nobodys_fault():
    suspicion = Suspicion(7, 0.0)
    assert suspicion.look([HOLDS, LACKS], 1.0, 1.0) is None
    assert suspicion.look([DONE, HOLDS], 1.6, 1.0) is None
    assert suspicion.look([DONE, HOLDS], 2.0, 1.0) is None
    assert suspicion.look([DONE, DONE], 2.3, 1.0) is None


def test_what_was_passed_on_and_never_came_is_the_links_fault():
    suspicion = Suspicion(7, 0.0)
    assert suspicion.look([DONE, DONE, LACKS], 1.0, 1.0) is None
    assert suspicion.look([DONE, DONE, LACKS], 1.6, 1.0) == Stuck(1)


def test_what_has_not_come_to_the_first_is_on_its_way_from_us():
    suspicion = Suspicion(7, 0.0)
    assert suspicion.look([LACKS, LACKS], 1.0, 1.0) is None
    assert suspicion.look([LACKS, LACKS], 0.9 + BUSY_FACTOR, 1.0) is None


def test_a_hop_that_denies_that_anything_came_counts_as_hung_after_a_while():
    suspicion = Suspicion(7, 0.0)
    assert suspicion.look([LACKS, LACKS], 1.0, 1.0) is None
    assert suspicion.look([LACKS, LACKS], 1.0 + BUSY_FACTOR, 1.0) == Hung((0,))


def test_a_last_hop_that_claims_to_have_answered_counts_as_hung():
    suspicion = Suspicion(7, 0.0)
    assert suspicion.look([DONE, DONE], 1.0, 1.0) is None
    assert suspicion.look([DONE, DONE], 1.5, 1.0) == Hung((1,))


def test_before_anything_was_answered_a_first_prompt_has_a_minute():
    suspicion = Suspicion(1, 0.0)
    holds = Progress(1, 0, 0)
    assert suspicion.look([holds], UNKNOWN_HOLD_S - 1, None) is None
    assert suspicion.look([holds], UNKNOWN_HOLD_S, None) == Hung((0,))

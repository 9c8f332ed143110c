from __future__ import annotations

import pytest

from peerd.protocol.identity import PeerId
from peerd.routing.failures.track_record import FIRST_AVOIDANCE_S, MAX_AVOIDANCE_S, MAX_PEERS, MIN_ASKING_S, TrackRecord

A, B = PeerId("a"), PeerId("b")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def record(clock: Clock) -> TrackRecord:
    return TrackRecord(clock)


def test_a_failed_peer_is_avoided_in_that_instant_and_comes_back_by_itself(record: TrackRecord, clock: Clock) -> None:
    record.failed(A)
    assert record.is_avoided(A)
    assert record.avoided() == {A}
    clock.now += FIRST_AVOIDANCE_S
    assert not record.is_avoided(A)
    assert record.avoided() == frozenset()


def test_why_a_peer_is_avoided_is_known_as_long_as_it_is(record: TrackRecord, clock: Clock) -> None:
    record.failed(A, "no way there")
    # A peer that fails again without a reason does so for the same reason, as far as we know.
    record.failed(A)
    record.failed(B)
    assert (record.why_avoided(A), record.why_avoided(B), record.why_avoided(PeerId("c"))) == ("no way there", "", "")
    clock.now += FIRST_AVOIDANCE_S
    assert record.why_avoided(A) == ""
    record.failed(A)
    record.succeeded(A)
    record.failed(A)
    assert record.why_avoided(A) == ""


def test_each_failure_in_a_row_is_avoided_for_twice_as_long(record: TrackRecord, clock: Clock) -> None:
    delays = []
    for _ in range(10):
        delays.append(record.failed(A))
        clock.now += delays[-1]
    assert delays == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert delays[-1] == MAX_AVOIDANCE_S


def test_requests_that_fail_together_count_once(record: TrackRecord, clock: Clock) -> None:
    for _ in range(8):
        record.failed(A)
    clock.now += FIRST_AVOIDANCE_S
    assert not record.is_avoided(A)


def test_a_success_makes_up_for_all_failures(record: TrackRecord, clock: Clock) -> None:
    for _ in range(3):
        clock.now += record.failed(A)
    record.failed(A)
    record.succeeded(A)
    assert not record.is_avoided(A)
    assert record.failed(A) == FIRST_AVOIDANCE_S


def test_round_trips_are_smoothed_for_each_peer(record: TrackRecord) -> None:
    assert record.rtt_s(A) is None
    record.measured(A, 0.1)
    record.measured(A, 0.9)
    record.measured(B, 0.0)
    assert record.rtt_s(A) == pytest.approx(0.2)
    assert record.rtts_s() == {A: pytest.approx(0.2), B: 0.0}


@pytest.mark.parametrize("rtt_s", [-0.1, float("inf"), float("nan")])
def test_an_impossible_round_trip_is_refused(record: TrackRecord, rtt_s: float) -> None:
    with pytest.raises(ValueError, match="round trip"):
        record.measured(A, rtt_s)


def test_made_up_peers_take_bounded_memory(record: TrackRecord) -> None:
    for number in range(MAX_PEERS + 10):
        record.measured(PeerId(str(number)), 0.1)
    assert len(record.rtts_s()) == MAX_PEERS


def test_a_sample_that_is_seldom_taken_counts_for_more(record: TrackRecord) -> None:
    record.measured(A, 0.1, gain=0.5)
    record.measured(A, 0.3, gain=0.5)
    assert record.rtt_s(A) == pytest.approx(0.2)


# By proof.


@pytest.fixture
def proving(clock: Clock) -> TrackRecord:
    return TrackRecord(clock, by_proof=True)


def test_a_failed_peer_stays_out_until_it_has_answered(proving: TrackRecord, clock: Clock) -> None:
    proving.failed(A)
    clock.now += 1000
    assert proving.avoided() == {A}
    assert proving.is_avoided(A)
    assert proving.take_doubted() == [A]
    proving.answered(A)
    assert not proving.is_avoided(A)


def test_a_peer_that_answers_all_the_while_waits_for_the_rest_of_its_time(proving: TrackRecord, clock: Clock) -> None:
    proving.failed(A)
    assert proving.take_doubted() == [A]
    assert proving.take_doubted() == []
    proving.answered(A)
    clock.now += FIRST_AVOIDANCE_S - 0.1
    assert proving.is_avoided(A)
    clock.now += 0.1
    assert not proving.is_avoided(A)


def test_a_peer_that_can_be_reached_again_is_back_at_once(proving: TrackRecord, clock: Clock) -> None:
    for _ in range(5):
        clock.now += proving.failed(A)
        proving.take_doubted()
        proving.answered(A)
    proving.failed(A)
    proving.take_doubted()
    proving.unanswered(A)
    clock.now += FIRST_AVOIDANCE_S
    assert proving.take_doubted() == [A]
    proving.answered(A)
    assert not proving.is_avoided(A)
    # But its failures are not forgotten until it has done something.
    assert proving.failed(A) > 100


def test_a_silent_peer_is_asked_ever_more_rarely_and_at_last_never(proving: TrackRecord, clock: Clock) -> None:
    proving.doubt(A)
    delays = []
    while proving.asks_at_s < float("inf"):
        delays.append(proving.asks_at_s - clock.now)
        clock.now = proving.asks_at_s
        assert proving.take_doubted() == [A]
        proving.unanswered(A)
    assert delays == [0, 5, 10, 20, 40, 80, 160, 320]
    assert proving.is_avoided(A)


def test_a_new_announcement_of_a_gone_peer_is_a_reason_to_ask_but_an_old_one_is_not(
    proving: TrackRecord, clock: Clock
) -> None:
    hurried = []
    proving.on_doubt.append(lambda: hurried.append(clock.now))
    proving.doubt(A)
    proving.announced(A, 7)
    proving.take_doubted()
    proving.announced(A, 8)
    assert proving.take_doubted() == []
    proving.unanswered(A)
    clock.now += 2
    for seq in (8, 7):
        proving.announced(A, seq)
        assert proving.take_doubted() == []
    hurried.clear()
    proving.announced(A, 9)
    assert hurried
    assert proving.take_doubted() == [A]
    for seq in range(10, 20):
        proving.unanswered(A)
        proving.announced(A, seq)
        # A peer that announces all the time is not asked all the time.
        assert proving.take_doubted() == []
        clock.now += MIN_ASKING_S
        assert proving.take_doubted() == [A]


def test_a_peer_that_is_wanted_is_asked_soon_but_not_all_the_time(proving: TrackRecord, clock: Clock) -> None:
    proving.wanted(A)
    assert not proving.has_doubts
    proving.doubt(A)
    proving.take_doubted()
    proving.wanted(A)
    assert proving.take_doubted() == [], "it is being asked"
    for _ in range(12):
        proving.unanswered(A)
        proving.wanted(A)
        assert proving.take_doubted() == []
        clock.now += MIN_ASKING_S
        assert proving.take_doubted() == [A]


def test_a_broken_connection_is_no_failure(proving: TrackRecord, clock: Clock) -> None:
    proving.doubt(A)
    assert proving.is_avoided(A)
    proving.take_doubted()
    proving.answered(A)
    assert not proving.is_avoided(A)
    assert proving.failed(A) == FIRST_AVOIDANCE_S


def test_where_nobody_asks_a_doubt_is_none(record: TrackRecord) -> None:
    record.doubt(A)
    assert not record.is_avoided(A)


def test_doubts_of_made_up_peers_take_bounded_memory(proving: TrackRecord) -> None:
    for number in range(MAX_PEERS + 10):
        proving.doubt(PeerId(str(number)))
    assert len(proving.avoided()) == MAX_PEERS


def test_after_a_sleep_the_failures_since_are_forgiven_but_doubts_remain(proving: TrackRecord, clock: Clock) -> None:
    proving.failed(A)
    proving.failed(B)
    proving.take_doubted()
    proving.answered(A)
    proving.forgive()
    assert proving.avoided() == {B}
    assert proving.failed(A) == FIRST_AVOIDANCE_S

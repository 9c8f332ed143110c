"""Silence: when we ask, when we give up, and what a slow peer or one that slept blames."""

from __future__ import annotations

from contextlib import suppress

import pytest

from peerd.protocol.connection.frames import PongFrame
from peerd.protocol.connection.liveness import Delivery, Liveness, Timeouts
from peerd.protocol.errors import ConnectionLost, Unresponsive

# What a system says of its TCP: everything has arrived, or nothing has since.
ARRIVES = Delivery(acknowledged_bytes=1000, unanswered=0)
VANISHES = Delivery(acknowledged_bytes=1000, unanswered=3)


def _answered(now: float = 100.0, rtt_s: float = 0.0) -> Liveness:
    liveness = Liveness(Timeouts(), now - rtt_s)
    liveness.heard(now)
    liveness.pong(PongFrame(liveness.ping(now - rtt_s)), now)
    return liveness


def _lost_at(
    liveness: Liveness, *, in_use: bool, delivery: Delivery | None = None, until: float = 130.0
) -> tuple[float, str]:
    """When a driver that is always on time gives up, having sent each PING at once; and why."""
    while (now := liveness.deadline(in_use=in_use)) < until:
        try:
            liveness.check(now, in_use=in_use, delivery=delivery)
        except (ConnectionLost, Unresponsive) as error:
            return now, str(error)
        if liveness.ping_due:
            liveness.ping(now)
    return until, "alive"


def test_it_asks_at_once_to_learn_the_round_trip() -> None:
    liveness = Liveness(Timeouts(), 100.0)
    assert liveness.ping_due
    token = liveness.ping(100.5)
    assert liveness.rtt_s is None
    liveness.pong(PongFrame(token), 100.75)
    assert liveness.rtt_s == 0.25


@pytest.mark.parametrize(("in_use", "asks_s"), [(False, 5), (True, 1)])
def test_it_asks_after_some_silence_and_sooner_while_a_task_waits(in_use: bool, asks_s: float) -> None:
    liveness = _answered()
    assert liveness.deadline(in_use=in_use) == 100 + asks_s
    liveness.check(99.9 + asks_s, in_use=in_use)
    assert not liveness.ping_due
    liveness.check(100 + asks_s, in_use=in_use)
    assert liveness.ping_due


def test_whatever_is_heard_ends_the_silence() -> None:
    liveness = _answered()
    liveness.heard(104)
    assert liveness.deadline(in_use=False) == 109
    liveness.check(109)
    liveness.heard(109.2)
    assert _lost_at(liveness, in_use=True, until=110) == (110, "alive")


def test_where_nothing_arrives_any_more_the_way_is_gone_in_two_seconds() -> None:
    lost_at, why = _lost_at(_answered(), in_use=True, delivery=VANISHES)
    assert lost_at == 102
    assert "nothing we send arrives" in why


def test_an_idle_connection_whose_way_is_gone_ends_too() -> None:
    assert _lost_at(_answered(), in_use=False, delivery=VANISHES)[0] == 106


def test_a_peer_whose_system_is_there_has_ten_seconds() -> None:
    lost_at, why = _lost_at(_answered(), in_use=True, delivery=ARRIVES)
    assert (lost_at, why) == (110, "the peer has been silent for 10.0 s")


def test_where_nobody_can_tell_it_is_five_seconds_in_use_and_ten_else() -> None:
    assert _lost_at(_answered(), in_use=True)[0] == 105
    assert _lost_at(_answered(), in_use=False)[0] == 110


def test_a_long_way_is_waited_for_longer() -> None:
    assert _lost_at(_answered(rtt_s=0.9), in_use=True)[0] == 108.5


def test_a_ping_that_could_not_even_be_sent_does_not_put_the_end_off() -> None:
    liveness = _answered()
    for at in (101, 101.5, 102, 102.5, 103, 103.5, 104, 104.5):
        liveness.check(at, in_use=True)
    with pytest.raises(ConnectionLost):
        liveness.check(105, in_use=True)


def test_a_slow_line_full_of_what_we_send_is_no_dead_one() -> None:
    """The PING stands behind what was sent before it; the far system takes all of it, slowly."""
    liveness = _answered()
    now, taken = 100.0, 0
    while now < 130:
        now = liveness.deadline(in_use=True)
        taken += 4096
        liveness.check(now, in_use=True, delivery=Delivery(taken, 0))
        if liveness.ping_due:
            token = liveness.ping(now)
    liveness.pong(PongFrame(token), now)
    assert liveness.rtt_s is not None
    assert liveness.rtt_s > 20
    # Once nothing is taken any more, that is silence like any other.
    assert _lost_at(liveness, in_use=True, delivery=Delivery(taken, 0), until=200)[0] - now < 11


def test_two_looks_are_needed_for_what_arrived_while_we_were_held_up() -> None:
    liveness = _answered()
    liveness.check(101.9, in_use=True, delivery=VANISHES)
    liveness.heard(102)
    assert _lost_at(liveness, in_use=True, delivery=VANISHES, until=103.5) == (103.5, "alive")


@pytest.mark.parametrize("in_use", [False, True])
def test_a_side_that_overslept_asks_again_instead_of_blaming_the_peer(in_use: bool) -> None:
    liveness = _answered()
    asked_at = liveness.deadline(in_use=in_use)
    liveness.check(asked_at, in_use=in_use)
    liveness.ping(asked_at)
    liveness.check(3600, in_use=in_use, delivery=ARRIVES)
    lost_at, _ = _lost_at(liveness, in_use=in_use, delivery=ARRIVES, until=3700)
    assert lost_at == 3600 + 10 - (1 if in_use else 5)


def test_a_side_that_overslept_and_is_answered_goes_on() -> None:
    liveness = _answered()
    liveness.check(3600, in_use=True)
    token = liveness.ping(3600)
    liveness.heard(3600.1)
    liveness.pong(PongFrame(token), 3600.1)
    assert liveness.deadline(in_use=True) == 3601.1


def test_a_loop_that_is_a_little_late_again_and_again_still_finds_the_dead() -> None:
    liveness = _answered()
    looks = 0
    with suppress(ConnectionLost):
        for looks in range(30):  # noqa: B007
            liveness.check(liveness.deadline(in_use=True) + 0.9, in_use=True)
    assert looks < 6


def test_coming_into_use_asks_at_once_after_a_silence() -> None:
    liveness = _answered()
    assert liveness.deadline(in_use=True) == 101
    liveness.check(104, in_use=True, delivery=VANISHES)
    assert liveness.ping_due
    liveness.ping(104)
    assert _lost_at(liveness, in_use=True, delivery=VANISHES)[0] == 105


def test_the_round_trip_is_measured_again_however_much_the_peer_says() -> None:
    liveness = _answered()
    for now in range(101, 110):
        liveness.heard(now)
        liveness.check(now, in_use=True)
        assert not liveness.ping_due
    liveness.heard(110)
    liveness.check(110, in_use=True)
    token = liveness.ping(110)
    liveness.pong(PongFrame(token), 110.5)
    assert liveness.rtt_s == 0.5


def test_a_peer_that_talks_and_never_reads_is_shown_out() -> None:
    liveness = _answered()
    heard = 100.0
    while heard < 169.9:
        heard += 0.1
        liveness.heard(heard)
        liveness.check(heard, in_use=True, delivery=ARRIVES)
    with pytest.raises(Unresponsive, match="talks but does not read: a PING of 60 s ago"):
        liveness.check(170.2, in_use=True, delivery=ARRIVES)


def test_asking_twice_is_asking_once() -> None:
    liveness = _answered()
    liveness.ask(100)
    token = liveness.ping(100)
    liveness.ask(100.1)
    assert not liveness.ping_due
    liveness.pong(PongFrame(token), 100.2)
    assert liveness.rtt_s == pytest.approx(0.2)


def test_an_answer_to_another_question_proves_nothing() -> None:
    liveness = Liveness(Timeouts(), 100.0)
    liveness.ping(100)
    liveness.pong(PongFrame(bytes(8)), 101)
    assert liveness.rtt_s is None

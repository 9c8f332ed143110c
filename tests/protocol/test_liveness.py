"""Silence: when we ask, when we give up, and whom an oversleeper blames."""

import pytest

from peerd.protocol.errors import ConnectionLost
from peerd.protocol.frames import Pong
from peerd.protocol.liveness import Liveness, Patience


def _answered(now=100.0):
    liveness = Liveness(Patience(), now)
    liveness.pong(Pong(liveness.ping(now)), now)
    return liveness


def test_it_asks_at_once_to_learn_the_round_trip():
    liveness = Liveness(Patience(), 100.0)
    assert liveness.ping_due
    token = liveness.ping(100.5)
    assert liveness.rtt_s is None
    liveness.pong(Pong(token), 100.75)
    assert liveness.rtt_s == 0.25


def test_after_five_seconds_of_silence_it_asks():
    liveness = _answered()
    assert liveness.deadline == 105
    liveness.check(104.9)
    assert not liveness.ping_due
    liveness.check(105)
    assert liveness.ping_due
    assert liveness.deadline == 110


def test_whatever_is_heard_ends_the_silence():
    liveness = _answered()
    liveness.heard(104)
    assert liveness.deadline == 109


def test_after_ten_seconds_of_silence_the_peer_is_gone():
    liveness = _answered()
    liveness.check(105)
    liveness.ping(105)
    with pytest.raises(ConnectionLost, match=r"silent for 10\.0 s"):
        liveness.check(110)


def test_a_ping_that_could_not_even_be_sent_does_not_put_the_end_off():
    liveness = _answered()
    liveness.check(105)
    with pytest.raises(ConnectionLost):
        liveness.check(110)


def test_who_overslept_asks_again_instead_of_blaming_the_peer():
    liveness = _answered()
    liveness.check(105)
    liveness.ping(105)
    liveness.check(3600)
    assert liveness.deadline == 3605
    with pytest.raises(ConnectionLost):
        liveness.check(3605)


def test_a_late_first_look_asks():
    liveness = _answered()
    liveness.check(3600)
    assert liveness.ping_due
    assert liveness.deadline == 3605


def test_the_deadline_only_ever_moves_later():
    liveness = Liveness(Patience(), 100.0)
    assert liveness.deadline == 105
    token = liveness.ping(100)
    liveness.check(105)
    assert liveness.deadline == 110
    liveness.heard(106)
    liveness.pong(Pong(token), 106)
    assert liveness.deadline == 111


def test_an_answer_to_another_question_proves_nothing():
    liveness = Liveness(Patience(), 100.0)
    liveness.ping(100)
    liveness.pong(Pong(bytes(8)), 101)
    assert liveness.rtt_s is None

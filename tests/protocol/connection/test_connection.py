"""Two connections back to back: the handshake, messages, the clock, the end."""

import pytest

from peerd.protocol.connection import noise
from peerd.protocol.connection.connection import ConnectionMachine
from peerd.protocol.connection.events import (
    GoneAway,
    HandshakeDone,
    MessageSent,
    StreamEnded,
    StreamOpened,
    StreamReadable,
)
from peerd.protocol.connection.frames import (
    Priority,
)
from peerd.protocol.errors import (
    ConnectionLost,
    HandshakeFailed,
    LocalProtocolError,
    RemoteProtocolError,
    WrongPeer,
)
from tests.fakes.machines import DIALLER, LISTENER, MIB, Pair, bodies, seeded_random


def test_both_sides_learn_the_others_identity(pair):
    assert pair.events[pair.one][0] == HandshakeDone(LISTENER.peer_id)
    assert pair.events[pair.other][0] == HandshakeDone(DIALLER.peer_id)
    assert pair.one.peer_id == LISTENER.peer_id


def test_the_round_trip_is_measured_at_once():
    pair = Pair()
    pair.shake(rtt_s=0.25)
    assert pair.one.rtt_s == pair.other.rtt_s == 0.25


def test_finding_another_peer_than_the_dialled_one_is_told_before_we_reveal_our_identity():
    pair = Pair(expected=DIALLER.peer_id)
    pair.move(pair.one)
    with pytest.raises(WrongPeer):
        pair.move(pair.other)
    assert pair.one.over
    assert pair.one.next_message(pair.now) is None
    assert not pair.of(pair.other, HandshakeDone)


def test_another_version_fails_in_the_handshake(monkeypatch):
    pair = Pair()
    monkeypatch.setattr(noise, "PROLOGUE", b"peerd/2")
    newer = ConnectionMachine(LISTENER, initiator=False, now=pair.now, random_bytes=seeded_random())
    newer.receive(pair.one.next_message(pair.now) or b"", pair.now)
    with pytest.raises(HandshakeFailed, match="another protocol version"):
        pair.one.receive(newer.next_message(pair.now) or b"", pair.now)


def test_a_silent_peer_has_ten_seconds_for_the_handshake():
    pair = Pair()
    pair.one.next_message(pair.now)
    assert pair.one.deadline == pair.now + 10
    pair.one.check(pair.now + 9.9)
    with pytest.raises(HandshakeFailed, match="within 10 s"):
        pair.one.check(pair.now + 10)
    assert pair.one.over


def test_streams_need_a_proven_peer():
    with pytest.raises(LocalProtocolError):
        Pair().one.streams.open("/test/1", Priority.CONTROL)


def test_a_message_arrives_with_its_header_and_body(pair):
    here, there = pair.open()
    pair.one.streams.send(here, {"seq": 1}, [b"ab", b"c"], Priority.CONTROL)
    pair.settle()
    message = pair.other.streams.read(there, 10)
    assert (message.header, bytes(message.body)) == ({"seq": 1}, b"abc")
    assert pair.of(pair.one, MessageSent) == [MessageSent(here)]
    assert pair.of(pair.other, StreamReadable) == [StreamReadable(there)]


def test_both_sides_may_open_streams_and_both_speak_on_each(pair):
    here, there = pair.open()
    back = pair.other.streams.open("/test/1", Priority.CONTROL)
    pair.settle()
    back_here = pair.of(pair.one, StreamOpened)[0].stream
    pair.other.streams.send(there, {}, [b"1"], Priority.CONTROL)
    pair.one.streams.send(back_here, {}, [b"2"], Priority.CONTROL)
    pair.settle()
    assert bodies(pair.one, here) == [b"1"]
    assert bodies(pair.other, back) == [b"2"]
    assert (here.id % 2, back.id % 2) == (1, 0)


def test_a_finished_stream_ends_after_its_last_message_and_is_then_forgotten(pair):
    here, there = pair.open()
    pair.one.streams.send(here, {}, [b"x"], Priority.CONTROL)
    pair.one.streams.finish(here)
    pair.one.streams.finish(here)
    pair.settle()
    assert not there.incoming.ended
    assert bodies(pair.other, there) == [b"x"]
    assert there.incoming.ended
    with pytest.raises(LocalProtocolError, match="finished"):
        pair.one.streams.send(here, {}, [], Priority.CONTROL)
    pair.other.streams.finish(there)
    pair.settle()
    assert repr(pair.one) == repr(pair.other) == "<Connection open streams=0 ready=0>"
    assert pair.of(pair.one, StreamEnded) == [StreamEnded(here)]


def test_a_reset_drops_what_is_unsent_and_unread_on_both_sides(pair):
    here, there = pair.open()
    pair.one.streams.send(here, {}, [bytes(MIB)], Priority.BULK)
    pair.move(pair.one)
    pair.one.streams.reset(here, "cancelled")
    pair.one.streams.reset(here, "twice")
    pair.settle()
    assert there.reset_code == "cancelled"
    assert (here.outgoing.unsent_bytes, there.incoming.buffered) == (0, 0)
    assert pair.of(pair.other, StreamEnded) == [StreamEnded(there)]
    assert pair.other.streams.read(there, MIB) is None


def test_frames_that_crossed_a_reset_are_ignored(pair):
    here, there = pair.open()
    pair.other.streams.send(there, {}, [bytes(100)], Priority.CONTROL)
    late = pair.other.next_message(pair.now)
    pair.one.streams.reset(here, "cancelled")
    pair.one.receive(late, pair.now)
    pair.settle()
    assert not pair.one.over


def test_closing_sends_what_is_queued_and_then_tells_a_peer_that_still_talks(pair):
    here, there = pair.open()
    pair.one.streams.send(here, {}, [b"last words"], Priority.CONTROL)
    pair.one.streams.close(here)
    pair.other.streams.send(there, {}, [bytes(MIB)], Priority.BULK)
    pair.settle()
    assert bodies(pair.other, there) == [b"last words"]
    assert there.incoming.ended
    assert there.reset_code == "closed"
    assert here.incoming.buffered == 0


def test_a_malformed_message_resets_its_stream_and_not_the_connection(pair):
    here, there = pair.open()
    pair.one.streams.send(here, {}, [bytes(11)], Priority.CONTROL)
    pair.settle()
    with pytest.raises(RemoteProtocolError, match="a body of 11 bytes"):
        pair.other.streams.read(there, 10)
    pair.settle()
    assert here.reset_code == "protocol"
    assert not pair.one.over


def test_a_half_open_connection_is_found_in_ten_seconds(pair):
    start = pair.now
    assert pair.one.deadline == start + 5
    pair.one.check(start + 5)
    assert pair.one.next_message(start + 5) is not None
    while pair.one.deadline < start + 10:
        pair.one.check(pair.one.deadline)
    with pytest.raises(ConnectionLost, match="silent"):
        pair.one.check(start + 10)
    assert pair.one.over


def test_a_connection_with_open_streams_is_asked_and_found_out_sooner(pair):
    start = pair.now
    here, _ = pair.open()
    assert pair.one.deadline == pair.other.deadline == start + 1
    pair.one.streams.reset(here, "closed")
    assert pair.one.deadline == start + 5
    pair.settle()
    assert pair.other.deadline == start + 5


def test_a_living_peer_answers_and_the_silence_starts_anew(pair):
    for _ in range(10):
        pair.now += 5
        pair.one.check(pair.now)
        pair.other.check(pair.now)
        pair.settle()
    assert pair.one.deadline == pair.now + 5


def test_going_away_is_the_last_thing_said(pair):
    here, there = pair.open()
    pair.one.streams.send(here, {}, [bytes(100)], Priority.CONTROL)
    pair.one.go_away("draining", "bye")
    pair.settle()
    assert pair.events[pair.other][-1] == GoneAway("draining", "bye")
    assert pair.one.over
    assert pair.other.over
    assert pair.one.next_message(pair.now) is None
    with pytest.raises(LocalProtocolError):
        pair.other.streams.send(there, {}, [], Priority.CONTROL)
    with pytest.raises(LocalProtocolError):
        pair.other.streams.open("/test/1", Priority.CONTROL)


def test_what_arrived_before_the_end_can_still_be_read(pair):
    here, there = pair.open()
    pair.one.streams.send(here, {}, [b"x"], Priority.CONTROL)
    pair.settle()
    pair.one.go_away("closed")
    pair.settle()
    assert bodies(pair.other, there) == [b"x"]

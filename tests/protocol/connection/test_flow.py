"""Which of a connection's frames go first, and how much may be on the way."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.connection.connection import Limits
from peerd.protocol.connection.frames import (
    DataFrame,
    OpenFrame,
    PingFrame,
    PongFrame,
    Priority,
    ResetFrame,
)
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES
from tests.fakes.machines import MIB, Pair, bodies, rogue_and_connection


def _next_stream(rogue, connection, now=1000.0):
    return rogue.read(connection.next_message(now)).stream


def test_a_decode_waits_for_one_frame_of_bulk_at_most():
    rogue, connection = rogue_and_connection()
    rogue.drain(connection)
    bulk = connection.streams.open("/bulk/1", Priority.BULK)
    decode = connection.streams.open("/decode/1", Priority.DECODE)
    connection.streams.send(bulk, {}, [bytes(4 * MIB)], Priority.BULK)
    assert [rogue.read(connection.next_message(1000)) for _ in range(2)] == [
        OpenFrame(bulk.id, "/bulk/1", Priority.BULK, INITIAL_CREDIT_BYTES),
        OpenFrame(decode.id, "/decode/1", Priority.DECODE, INITIAL_CREDIT_BYTES),
    ]
    frame = rogue.read(connection.next_message(1000))
    assert (frame.stream, len(frame.payload)) == (bulk.id, 16 * 1024)
    connection.streams.send(decode, {}, [bytes(2048)], Priority.DECODE)
    assert [_next_stream(rogue, connection) for _ in range(2)] == [decode.id, bulk.id]


def test_a_decode_never_overtakes_the_prefill_before_it_on_the_same_stream():
    rogue, connection = rogue_and_connection()
    session = connection.streams.open("/infer/1", Priority.DECODE)
    other = connection.streams.open("/infer/1", Priority.DECODE)
    rogue.drain(connection)
    connection.streams.send(session, {}, [bytes(20_000)], Priority.PREFILL)
    connection.streams.send(session, {}, [bytes(2048)], Priority.DECODE)
    connection.streams.send(other, {}, [bytes(2048)], Priority.DECODE)
    # The session ranks as a prefill until its prefill is out: the other's decode goes first.
    assert [_next_stream(rogue, connection) for _ in range(4)] == [other.id, session.id, session.id, session.id]


def test_control_frames_go_before_all_data():
    rogue, connection = rogue_and_connection()
    stream = connection.streams.open("/test/1", Priority.CONTROL)
    rogue.drain(connection)
    connection.streams.send(stream, {}, [bytes(100)], Priority.CONTROL)
    rogue.say(connection, PingFrame(b"12345678"))
    doomed = connection.streams.open("/test/1", Priority.BULK)
    connection.streams.reset(doomed, "cancelled")
    frames = [rogue.read(connection.next_message(1000)) for _ in range(4)]
    assert [type(frame) for frame in frames] == [PongFrame, OpenFrame, ResetFrame, DataFrame]


def test_nothing_more_is_sent_than_the_reader_has_room_for(pair):
    here, there = pair.open()
    for _ in range(10):
        pair.one.streams.send(here, {}, [bytes(MIB)], Priority.BULK)
    pair.settle()
    assert there.incoming.buffered == INITIAL_CREDIT_BYTES
    assert here.outgoing.unsent_messages == 10


@pytest.mark.parametrize(("rtt_s", "rounds"), [(0.1, 1), (0.0, 16)])
def test_on_a_long_line_a_long_body_gets_all_its_credit_at_once_and_on_a_short_one_bit_by_bit(rtt_s, rounds):
    pair = Pair()
    pair.shake(rtt_s)
    here, there = pair.open()
    pair.one.streams.send(here, {}, [bytes(4 * MIB)], Priority.BULK)
    pair.settle()
    looks = 0
    while (message := pair.other.streams.read(there, 4 * MIB)) is None:
        pair.settle()
        looks += 1
    assert len(message.body) == 4 * MIB
    assert looks == rounds


def test_a_stream_that_nobody_reads_does_not_hold_another_up(pair):
    stuck, _ = pair.open(Priority.DECODE)
    moving, there = pair.open(Priority.BULK)
    pair.one.streams.send(stuck, {}, [bytes(MIB)], Priority.DECODE)
    pair.one.streams.send(moving, {}, [bytes(MIB)], Priority.BULK)
    pair.settle()
    while not (found := bodies(pair.other, there)):
        pair.settle()
    assert len(found[0]) == MIB


def test_long_bodies_share_what_one_connection_may_hold():
    pair = Pair(limits=Limits(shared_credit_bytes=MIB))
    pair.shake(rtt_s=0.1)
    streams = [pair.open(Priority.BULK) for _ in range(4)]
    for here, _ in streams:
        pair.one.streams.send(here, {}, [bytes(4 * MIB)], Priority.BULK)
    pair.settle()
    for _, there in streams:
        assert pair.other.streams.read(there, 4 * MIB) is None
    pair.settle()
    held = sum(there.incoming.buffered for _, there in streams)
    assert held <= MIB + 4 * INITIAL_CREDIT_BYTES
    waiting = list(streams)
    while waiting:
        waiting = [(here, there) for here, there in waiting if pair.other.streams.read(there, 4 * MIB) is None]
        pair.settle()


operations = st.lists(
    st.tuples(
        st.sampled_from(["send", "read", "move", "finish"]),
        st.booleans(),
        st.integers(0, 2),
        st.integers(0, 300_000),
        st.sampled_from(Priority),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(operations)
def test_no_message_and_no_credit_is_created_or_lost(steps):
    pair = Pair()
    pair.settle()
    streams = [pair.open() for _ in range(3)]
    sent, received = defaultdict(list), defaultdict(list)
    for action, forth, number, size, priority in steps:
        here, there = streams[number]
        sender, receiver = (pair.one, pair.other) if forth else (pair.other, pair.one)
        from_stream, to_stream = (here, there) if forth else (there, here)
        if action == "send" and not from_stream.outgoing.finishing:
            body = bytes([len(sent[forth, number])]) * size
            sender.streams.send(from_stream, {}, [body], priority)
            sent[forth, number].append(body)
        elif action == "read":
            received[forth, number] += bodies(receiver, to_stream)
        elif action == "move":
            pair.move(sender)
        elif action == "finish":
            sender.streams.finish(from_stream)
    pair.settle()
    for here, there in streams:
        for sender, receiver in ((here, there), (there, here)):
            unused = sender.outgoing.credit + receiver.incoming.buffered
            assert receiver.incoming.outstanding == unused
    moving = True
    while moving:
        before = dict(pair.sent)
        for number, (here, there) in enumerate(streams):
            received[True, number] += bodies(pair.other, there)
            received[False, number] += bodies(pair.one, here)
        pair.settle()
        moving = before != pair.sent
    assert {key: value for key, value in sent.items() if value} == {k: v for k, v in received.items() if v}

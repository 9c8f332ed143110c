"""A connection against a peer that keeps the handshake and no other rule."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.connection.connection import ConnectionMachine
from peerd.protocol.connection.events import (
    StreamOpened,
    StreamReadable,
)
from peerd.protocol.connection.frames import (
    MAX_FRAME_BYTES,
    CreditFrame,
    DataFrame,
    GoAwayFrame,
    OpenFrame,
    PingFrame,
    PongFrame,
    Priority,
    ResetFrame,
    encode_frame,
)
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES
from peerd.protocol.connection.stream_table import MAX_STREAMS
from peerd.protocol.connection.unasked import CREDITS_AT_ONCE, PINGS_A_SECOND, PINGS_AT_ONCE
from peerd.protocol.errors import (
    Overloaded,
    PeerdError,
    RemoteProtocolError,
)
from tests.fakes.machines import LISTENER, rogue_and_connection, seeded_random

OPEN = OpenFrame(1, "/test/1", Priority.BULK, INITIAL_CREDIT_BYTES)


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [bytes(MAX_FRAME_BYTES + 1)],
        [bytes([9, 0, 0, 0, 0, 1])],
        [bytes([2, 4, 0, 0, 0, 1])],
        [DataFrame(1, memoryview(b"x"))],
        [DataFrame(2, memoryview(b"x"))],
        [CreditFrame(7, 1)],
        [ResetFrame(1, "closed")],
        [OpenFrame(2, "/test/1", Priority.BULK, 0)],
        [OPEN, OPEN],
        [OpenFrame(3, "/test/1", Priority.BULK, 0), OPEN],
        [OPEN, DataFrame(1, memoryview(b"x"), fin=True), DataFrame(1, memoryview(b"y"))],
        [OPEN, DataFrame(1, memoryview(b""), fin=True), DataFrame(1, memoryview(b""), fin=True)],
        [OPEN, *[DataFrame(1, memoryview(bytes(32 * 1024)))] * 3],
        [OPEN, CreditFrame(1, 2**31 - 1)],
    ],
    ids=lambda frames: re.sub(r"<memory at \w+>", "...", repr(frames))[:60],
)
def test_the_first_frame_that_breaks_a_rule_ends_the_connection_with_a_reason(frames):
    rogue, connection = rogue_and_connection()
    rogue.drain(connection)
    with pytest.raises(RemoteProtocolError) as caught:
        rogue.say(connection, *frames)
    assert connection.over
    assert rogue.drain(connection) == [GoAwayFrame("protocol", str(caught.value))]
    rogue.say(connection, OPEN)
    assert connection.next_message(1000) is None


def test_a_changed_a_repeated_or_a_plain_message_ends_the_connection():
    for spoil in (
        lambda message: message[:-1] + bytes([message[-1] ^ 1]),
        lambda message: message[:-1],
        lambda message: encode_frame(OPEN),
    ):
        rogue, connection = rogue_and_connection()
        with pytest.raises(RemoteProtocolError, match="did not authenticate"):
            connection.receive(spoil(rogue.sending.encrypt(encode_frame(OPEN))), 1000)
    rogue, connection = rogue_and_connection()
    message = rogue.sending.encrypt(encode_frame(OPEN))
    connection.receive(message, 1000)
    with pytest.raises(RemoteProtocolError, match="did not authenticate"):
        connection.receive(message, 1000)


def test_one_stream_too_many_is_refused_and_the_others_live():
    rogue, connection = rogue_and_connection()
    rogue.drain(connection)
    for number in range(MAX_STREAMS + 1):
        rogue.say(connection, OpenFrame(2 * number + 1, "/test/1", Priority.BULK, 0))
    assert rogue.drain(connection) == [ResetFrame(2 * MAX_STREAMS + 1, "overloaded")]
    rogue.say(connection, DataFrame(2 * MAX_STREAMS + 1, memoryview(b"not heard of it yet")))
    assert not connection.over


def test_we_open_no_more_streams_than_the_peer_takes(pair):
    for _ in range(MAX_STREAMS):
        pair.one.streams.open("/test/1", Priority.CONTROL)
    with pytest.raises(Overloaded):
        pair.one.streams.open("/test/1", Priority.CONTROL)


def test_opening_streams_too_fast_ends_the_connection():
    rogue, connection = rogue_and_connection()
    for number in range(1024):
        rogue.say(
            connection, OpenFrame(2 * number + 1, "/test/1", Priority.BULK, 0), ResetFrame(2 * number + 1, "closed")
        )
    with pytest.raises(RemoteProtocolError, match="too fast"):
        rogue.say(connection, OpenFrame(2049, "/test/1", Priority.BULK, 0))


def test_opening_streams_at_an_honest_rate_does_not():
    rogue, connection = rogue_and_connection()
    for number in range(3000):
        now = 1000 + number / 500
        rogue.say(
            connection,
            OpenFrame(2 * number + 1, "/test/1", Priority.BULK, 0),
            ResetFrame(2 * number + 1, "closed"),
            now=now,
        )


def test_pings_at_once_cost_one_answer():
    rogue, connection = rogue_and_connection()
    rogue.drain(connection)
    for number in range(PINGS_AT_ONCE):
        rogue.say(connection, PingFrame(number.to_bytes(8, "big")))
    assert rogue.drain(connection) == [PongFrame((PINGS_AT_ONCE - 1).to_bytes(8, "big"))]


def test_a_flood_of_pings_ends_the_connection_and_as_many_as_are_of_use_do_not():
    rogue, connection = rogue_and_connection()
    for number in range(1000):
        rogue.say(connection, PingFrame(bytes(8)), now=1000 + number / PINGS_A_SECOND)
    with pytest.raises(RemoteProtocolError, match="PINGs"):
        rogue.say(connection, *[PingFrame(bytes(8))] * (PINGS_AT_ONCE + 1), now=1125)
    assert connection.over


def test_credit_that_nothing_was_sent_for_ends_the_connection():
    rogue, connection = rogue_and_connection()
    rogue.say(connection, OPEN)
    with pytest.raises(RemoteProtocolError, match="credit"):
        rogue.say(connection, *[CreditFrame(1, 1)] * (CREDITS_AT_ONCE + 1))
    assert connection.over


def test_credit_for_what_was_sent_is_taken_for_ever():
    rogue, connection = rogue_and_connection()
    rogue.say(connection, OPEN)
    stream = next(event.stream for event in iter(connection.next_event, None) if isinstance(event, StreamOpened))
    for _ in range(10 * CREDITS_AT_ONCE):
        connection.streams.send(stream, {}, [bytes(100)], Priority.BULK)
        sent = sum(len(frame.payload) for frame in rogue.drain(connection) if isinstance(frame, DataFrame))
        rogue.say(connection, CreditFrame(1, sent))
    assert not connection.over


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_any_bytes_instead_of_a_handshake_give_a_typed_error(messages):
    connection = ConnectionMachine(LISTENER, initiator=False, now=1000, random_bytes=seeded_random())
    try:
        for message in messages:
            connection.receive(message, 1000)
            connection.next_message(1000)
    except PeerdError:
        assert connection.over
        assert connection.next_message(1000) is None


frames = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda kind, fin, stream, rest: bytes([kind, fin, 0, 0, 0, stream]) + rest,
              st.integers(1, 7), st.integers(0, 1), st.integers(0, 5), st.binary(max_size=30)),
    st.builds(OpenFrame, st.integers(1, 9), st.just("/test/1"), st.sampled_from(Priority), st.integers(0, 2**31 - 1)),
    st.builds(DataFrame, st.integers(1, 9), st.binary(min_size=1, max_size=99).map(memoryview), st.booleans()),
    st.builds(CreditFrame, st.integers(1, 9), st.integers(1, 2**31 - 1)),
    st.builds(ResetFrame, st.integers(1, 9), st.just("closed")),
    st.builds(PingFrame, st.binary(min_size=8, max_size=8)),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(frames, max_size=30))
def test_any_frames_give_events_or_one_typed_error(said):
    rogue, connection = rogue_and_connection()
    try:
        for frame in said:
            rogue.say(connection, frame)
            while (event := connection.next_event()) is not None:
                if isinstance(event, StreamReadable):
                    _try_to_read(connection, event.stream)
                elif isinstance(event, StreamOpened):
                    connection.streams.send(event.stream, {"got": 1}, [bytes(10)], Priority.DECODE)
    except PeerdError:
        assert connection.over
    assert len(rogue.drain(connection)) <= 4 * len(said) + 4


def _try_to_read(connection, stream):
    try:
        while connection.streams.read(stream, 50) is not None:
            pass
    except RemoteProtocolError:
        return

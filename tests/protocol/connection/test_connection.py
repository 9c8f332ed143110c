"""Two connections back to back, and one against a peer that keeps the handshake but no other rule."""

import itertools
import re
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.connection import noise
from peerd.protocol.connection.connection import ConnectionMachine, Limits
from peerd.protocol.connection.events import (
    GoneAway,
    HandshakeDone,
    MessageSent,
    StreamEnded,
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
    decode_frame,
    encode_frame,
)
from peerd.protocol.connection.noise import Handshake
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES
from peerd.protocol.connection.stream_table import MAX_STREAMS
from peerd.protocol.errors import (
    ConnectionLost,
    HandshakeFailed,
    LocalProtocolError,
    Overloaded,
    PeerdError,
    RemoteProtocolError,
    WrongPeer,
)
from peerd.protocol.identity import Identity

DIALLER, LISTENER = Identity.from_seed(b"1" * 32), Identity.from_seed(b"2" * 32)
MIB = 1024 * 1024


def _random():
    """Randomness that is the same in every run."""
    counter = itertools.count(1)
    return lambda count: next(counter).to_bytes(count, "big")


class Pair:
    """A dialler `one` and a listener `other`, joined by two queues of messages that move when told."""

    def __init__(self, limits=None, **arguments):
        self.now = 1000.0
        self.one = ConnectionMachine(
            DIALLER, initiator=True, now=self.now, random_bytes=_random(), limits=limits, **arguments
        )
        self.other = ConnectionMachine(LISTENER, initiator=False, now=self.now, random_bytes=_random(), limits=limits)
        self.events = {self.one: [], self.other: []}
        self.sent = {self.one: 0, self.other: 0}

    def shake(self, rtt_s):
        """Handshake and first PINGs, over a line of this length."""
        for sender in (self.one, self.other, self.one):
            self.move(sender)
        pings = self.one.next_message(self.now), self.other.next_message(self.now)
        self.now += rtt_s
        self.other.receive(pings[0], self.now)
        self.one.receive(pings[1], self.now)
        self.settle()

    def move(self, sender):
        """Let one message pass. Returns whether there was one."""
        message = sender.next_message(self.now)
        self.collect(sender)
        if message is None:
            return False
        self.sent[sender] += 1
        receiver = self.other if sender is self.one else self.one
        receiver.receive(message, self.now)
        self.collect(receiver)
        return True

    def settle(self):
        """Let messages pass until neither side has any."""
        while self.move(self.one) | self.move(self.other):
            pass

    def collect(self, connection):
        while (event := connection.next_event()) is not None:
            self.events[connection].append(event)

    def of(self, connection, kind):
        return [event for event in self.events[connection] if isinstance(event, kind)]

    def open(self, priority=Priority.CONTROL):
        """A stream from `one`, as both sides see it."""
        here = self.one.open_stream("/test/1", priority)
        self.settle()
        return here, self.of(self.other, StreamOpened)[-1].stream


@pytest.fixture
def pair():
    pair = Pair()
    pair.settle()
    return pair


def _bodies(connection, stream, max_body=64 * MIB):
    found = []
    while (message := connection.read(stream, max_body)) is not None:
        found.append(bytes(message.body))
    return found


# The handshake.


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
    newer = ConnectionMachine(LISTENER, initiator=False, now=pair.now, random_bytes=_random())
    newer.receive(pair.one.next_message(pair.now), pair.now)
    with pytest.raises(HandshakeFailed, match="another protocol version"):
        pair.one.receive(newer.next_message(pair.now), pair.now)


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
        Pair().one.open_stream("/test/1", Priority.CONTROL)


# Messages.


def test_a_message_arrives_with_its_header_and_body(pair):
    here, there = pair.open()
    pair.one.send(here, {"seq": 1}, [b"ab", b"c"], Priority.CONTROL)
    pair.settle()
    message = pair.other.read(there, 10)
    assert (message.header, bytes(message.body)) == ({"seq": 1}, b"abc")
    assert pair.of(pair.one, MessageSent) == [MessageSent(here)]
    assert pair.of(pair.other, StreamReadable) == [StreamReadable(there)]


def test_both_sides_may_open_streams_and_both_speak_on_each(pair):
    here, there = pair.open()
    back = pair.other.open_stream("/test/1", Priority.CONTROL)
    pair.settle()
    back_here = pair.of(pair.one, StreamOpened)[0].stream
    pair.other.send(there, {}, [b"1"], Priority.CONTROL)
    pair.one.send(back_here, {}, [b"2"], Priority.CONTROL)
    pair.settle()
    assert _bodies(pair.one, here) == [b"1"]
    assert _bodies(pair.other, back) == [b"2"]
    assert (here.id % 2, back.id % 2) == (1, 0)


def test_a_finished_stream_ends_after_its_last_message_and_is_then_forgotten(pair):
    here, there = pair.open()
    pair.one.send(here, {}, [b"x"], Priority.CONTROL)
    pair.one.finish(here)
    pair.one.finish(here)
    pair.settle()
    assert not there.incoming.ended
    assert _bodies(pair.other, there) == [b"x"]
    assert there.incoming.ended
    with pytest.raises(LocalProtocolError, match="finished"):
        pair.one.send(here, {}, [], Priority.CONTROL)
    pair.other.finish(there)
    pair.settle()
    assert repr(pair.one) == repr(pair.other) == "<Connection open streams=0 ready=0>"
    assert pair.of(pair.one, StreamEnded) == [StreamEnded(here)]


def test_a_reset_drops_what_is_unsent_and_unread_on_both_sides(pair):
    here, there = pair.open()
    pair.one.send(here, {}, [bytes(MIB)], Priority.BULK)
    pair.move(pair.one)
    pair.one.reset(here, "cancelled")
    pair.one.reset(here, "twice")
    pair.settle()
    assert there.reset_code == "cancelled"
    assert (here.outgoing.unsent_bytes, there.incoming.buffered) == (0, 0)
    assert pair.of(pair.other, StreamEnded) == [StreamEnded(there)]
    assert pair.other.read(there, MIB) is None


def test_frames_that_crossed_a_reset_are_ignored(pair):
    here, there = pair.open()
    pair.other.send(there, {}, [bytes(100)], Priority.CONTROL)
    late = pair.other.next_message(pair.now)
    pair.one.reset(here, "cancelled")
    pair.one.receive(late, pair.now)
    pair.settle()
    assert not pair.one.over


def test_closing_sends_what_is_queued_and_then_tells_a_peer_that_still_talks(pair):
    here, there = pair.open()
    pair.one.send(here, {}, [b"last words"], Priority.CONTROL)
    pair.one.close(here)
    pair.other.send(there, {}, [bytes(MIB)], Priority.BULK)
    pair.settle()
    assert _bodies(pair.other, there) == [b"last words"]
    assert there.incoming.ended
    assert there.reset_code == "closed"
    assert here.incoming.buffered == 0


def test_a_malformed_message_resets_its_stream_and_not_the_connection(pair):
    here, there = pair.open()
    pair.one.send(here, {}, [bytes(11)], Priority.CONTROL)
    pair.settle()
    with pytest.raises(RemoteProtocolError, match="a body of 11 bytes"):
        pair.other.read(there, 10)
    pair.settle()
    assert here.reset_code == "protocol"
    assert not pair.one.over


# Priorities.


def _next_stream(rogue, connection, now=1000.0):
    return rogue.read(connection.next_message(now)).stream


def test_a_decode_waits_for_one_frame_of_bulk_at_most():
    rogue, connection = _rogue()
    rogue.drain(connection)
    bulk = connection.open_stream("/bulk/1", Priority.BULK)
    decode = connection.open_stream("/decode/1", Priority.DECODE)
    connection.send(bulk, {}, [bytes(4 * MIB)], Priority.BULK)
    assert [rogue.read(connection.next_message(1000)) for _ in range(2)] == [
        OpenFrame(bulk.id, "/bulk/1", Priority.BULK, INITIAL_CREDIT_BYTES),
        OpenFrame(decode.id, "/decode/1", Priority.DECODE, INITIAL_CREDIT_BYTES),
    ]
    frame = rogue.read(connection.next_message(1000))
    assert (frame.stream, len(frame.payload)) == (bulk.id, 16 * 1024)
    connection.send(decode, {}, [bytes(2048)], Priority.DECODE)
    assert [_next_stream(rogue, connection) for _ in range(2)] == [decode.id, bulk.id]


def test_a_decode_never_overtakes_the_prefill_before_it_on_the_same_stream():
    rogue, connection = _rogue()
    session = connection.open_stream("/infer/1", Priority.DECODE)
    other = connection.open_stream("/infer/1", Priority.DECODE)
    rogue.drain(connection)
    connection.send(session, {}, [bytes(20_000)], Priority.PREFILL)
    connection.send(session, {}, [bytes(2048)], Priority.DECODE)
    connection.send(other, {}, [bytes(2048)], Priority.DECODE)
    # The session ranks as a prefill until its prefill is out: the other's decode goes first.
    assert [_next_stream(rogue, connection) for _ in range(4)] == [other.id, session.id, session.id, session.id]


def test_control_frames_go_before_all_data():
    rogue, connection = _rogue()
    stream = connection.open_stream("/test/1", Priority.CONTROL)
    rogue.drain(connection)
    connection.send(stream, {}, [bytes(100)], Priority.CONTROL)
    rogue.say(connection, PingFrame(b"12345678"))
    doomed = connection.open_stream("/test/1", Priority.BULK)
    connection.reset(doomed, "cancelled")
    frames = [rogue.read(connection.next_message(1000)) for _ in range(4)]
    assert [type(frame) for frame in frames] == [PongFrame, OpenFrame, ResetFrame, DataFrame]


# Credit.


def test_nothing_more_is_sent_than_the_reader_has_room_for(pair):
    here, there = pair.open()
    for _ in range(10):
        pair.one.send(here, {}, [bytes(MIB)], Priority.BULK)
    pair.settle()
    assert there.incoming.buffered == INITIAL_CREDIT_BYTES
    assert here.outgoing.unsent_messages == 10


@pytest.mark.parametrize(("rtt_s", "rounds"), [(0.1, 1), (0.0, 16)])
def test_on_a_long_line_a_long_body_gets_all_its_credit_at_once_and_on_a_short_one_bit_by_bit(rtt_s, rounds):
    pair = Pair()
    pair.shake(rtt_s)
    here, there = pair.open()
    pair.one.send(here, {}, [bytes(4 * MIB)], Priority.BULK)
    pair.settle()
    looks = 0
    while (message := pair.other.read(there, 4 * MIB)) is None:
        pair.settle()
        looks += 1
    assert len(message.body) == 4 * MIB
    assert looks == rounds


def test_a_stream_that_nobody_reads_does_not_hold_another_up(pair):
    stuck, _ = pair.open(Priority.DECODE)
    moving, there = pair.open(Priority.BULK)
    pair.one.send(stuck, {}, [bytes(MIB)], Priority.DECODE)
    pair.one.send(moving, {}, [bytes(MIB)], Priority.BULK)
    pair.settle()
    while not (found := _bodies(pair.other, there)):
        pair.settle()
    assert len(found[0]) == MIB


def test_long_bodies_share_what_one_connection_may_hold():
    pair = Pair(limits=Limits(shared_credit_bytes=MIB))
    pair.shake(rtt_s=0.1)
    streams = [pair.open(Priority.BULK) for _ in range(4)]
    for here, _ in streams:
        pair.one.send(here, {}, [bytes(4 * MIB)], Priority.BULK)
    pair.settle()
    for _, there in streams:
        assert pair.other.read(there, 4 * MIB) is None
    pair.settle()
    held = sum(there.incoming.buffered for _, there in streams)
    assert held <= MIB + 4 * INITIAL_CREDIT_BYTES
    waiting = list(streams)
    while waiting:
        waiting = [(here, there) for here, there in waiting if pair.other.read(there, 4 * MIB) is None]
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
            sender.send(from_stream, {}, [body], priority)
            sent[forth, number].append(body)
        elif action == "read":
            received[forth, number] += _bodies(receiver, to_stream)
        elif action == "move":
            pair.move(sender)
        elif action == "finish":
            sender.finish(from_stream)
    pair.settle()
    for here, there in streams:
        for sender, receiver in ((here, there), (there, here)):
            unused = sender.outgoing.credit + receiver.incoming.buffered
            assert receiver.incoming.outstanding == unused
    moving = True
    while moving:
        before = dict(pair.sent)
        for number, (here, there) in enumerate(streams):
            received[True, number] += _bodies(pair.other, there)
            received[False, number] += _bodies(pair.one, here)
        pair.settle()
        moving = before != pair.sent
    assert {key: value for key, value in sent.items() if value} == {k: v for k, v in received.items() if v}


# The clock.


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
    pair.one.reset(here, "closed")
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


# The end.


def test_going_away_is_the_last_thing_said(pair):
    here, there = pair.open()
    pair.one.send(here, {}, [bytes(100)], Priority.CONTROL)
    pair.one.go_away("draining", "bye")
    pair.settle()
    assert pair.events[pair.other][-1] == GoneAway("draining", "bye")
    assert pair.one.over
    assert pair.other.over
    assert pair.one.next_message(pair.now) is None
    with pytest.raises(LocalProtocolError):
        pair.other.send(there, {}, [], Priority.CONTROL)
    with pytest.raises(LocalProtocolError):
        pair.other.open_stream("/test/1", Priority.CONTROL)


def test_what_arrived_before_the_end_can_still_be_read(pair):
    here, there = pair.open()
    pair.one.send(here, {}, [b"x"], Priority.CONTROL)
    pair.settle()
    pair.one.go_away("closed")
    pair.settle()
    assert _bodies(pair.other, there) == [b"x"]


# A hostile peer.


class Rogue:
    """Keeps the handshake, then says what it likes."""

    def __init__(self):
        self._handshake = Handshake(DIALLER, initiator=True, random_bytes=_random())

    def shake(self, connection):
        connection.receive(self._handshake.write(), 1000)
        self._handshake.read(connection.next_message(1000))
        connection.receive(self._handshake.write(), 1000)
        self.sending, self.receiving = self._handshake.split()

    def say(self, connection, *frames, now=1000.0):
        for frame in frames:
            connection.receive(self.sending.encrypt(frame if isinstance(frame, bytes) else encode_frame(frame)), now)

    def read(self, message):
        return decode_frame(self.receiving.decrypt(message))

    def drain(self, connection):
        found = []
        while (message := connection.next_message(1000)) is not None:
            found.append(self.read(message))
        return found


def _rogue():
    rogue = Rogue()
    connection = ConnectionMachine(LISTENER, initiator=False, now=1000, random_bytes=_random())
    rogue.shake(connection)
    return rogue, connection


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
    rogue, connection = _rogue()
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
        rogue, connection = _rogue()
        with pytest.raises(RemoteProtocolError, match="did not authenticate"):
            connection.receive(spoil(rogue.sending.encrypt(encode_frame(OPEN))), 1000)
    rogue, connection = _rogue()
    message = rogue.sending.encrypt(encode_frame(OPEN))
    connection.receive(message, 1000)
    with pytest.raises(RemoteProtocolError, match="did not authenticate"):
        connection.receive(message, 1000)


def test_one_stream_too_many_is_refused_and_the_others_live():
    rogue, connection = _rogue()
    rogue.drain(connection)
    for number in range(MAX_STREAMS + 1):
        rogue.say(connection, OpenFrame(2 * number + 1, "/test/1", Priority.BULK, 0))
    assert rogue.drain(connection) == [ResetFrame(2 * MAX_STREAMS + 1, "overloaded")]
    rogue.say(connection, DataFrame(2 * MAX_STREAMS + 1, memoryview(b"not heard of it yet")))
    assert not connection.over


def test_we_open_no_more_streams_than_the_peer_takes(pair):
    for _ in range(MAX_STREAMS):
        pair.one.open_stream("/test/1", Priority.CONTROL)
    with pytest.raises(Overloaded):
        pair.one.open_stream("/test/1", Priority.CONTROL)


def test_opening_streams_too_fast_ends_the_connection():
    rogue, connection = _rogue()
    for number in range(1024):
        rogue.say(
            connection, OpenFrame(2 * number + 1, "/test/1", Priority.BULK, 0), ResetFrame(2 * number + 1, "closed")
        )
    with pytest.raises(RemoteProtocolError, match="too fast"):
        rogue.say(connection, OpenFrame(2049, "/test/1", Priority.BULK, 0))


def test_opening_streams_at_an_honest_rate_does_not():
    rogue, connection = _rogue()
    for number in range(3000):
        now = 1000 + number / 500
        rogue.say(
            connection,
            OpenFrame(2 * number + 1, "/test/1", Priority.BULK, 0),
            ResetFrame(2 * number + 1, "closed"),
            now=now,
        )


def test_a_flood_of_pings_costs_one_answer():
    rogue, connection = _rogue()
    rogue.drain(connection)
    for number in range(100):
        rogue.say(connection, PingFrame(number.to_bytes(8, "big")))
    assert rogue.drain(connection) == [PongFrame((99).to_bytes(8, "big"))]


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_any_bytes_instead_of_a_handshake_give_a_typed_error(messages):
    connection = ConnectionMachine(LISTENER, initiator=False, now=1000, random_bytes=_random())
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
    rogue, connection = _rogue()
    try:
        for frame in said:
            rogue.say(connection, frame)
            while (event := connection.next_event()) is not None:
                if isinstance(event, StreamReadable):
                    _try_to_read(connection, event.stream)
                elif isinstance(event, StreamOpened):
                    connection.send(event.stream, {"got": 1}, [bytes(10)], Priority.DECODE)
    except PeerdError:
        assert connection.over
    assert len(rogue.drain(connection)) <= 4 * len(said) + 4


def _try_to_read(connection, stream):
    try:
        while connection.read(stream, 50) is not None:
            pass
    except RemoteProtocolError:
        return

"""One stream by itself: its state table, its two queues, and what they cost."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.protocol.connection.frames import MAX_CREDIT, DataFrame, Priority
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES, MAX_WINDOW_BYTES, StreamInbox, StreamOutbox
from peerd.protocol.connection.streams import TRANSITIONS, State, StreamMachine, Transition
from peerd.protocol.encoding.wire import encode_message
from peerd.protocol.errors import LocalProtocolError, RemoteProtocolError

FROM_PEER = {Transition.DATA, Transition.FIN, Transition.CREDIT, Transition.RESET}


def _stream(state=State.OPEN):
    stream = StreamMachine(1, "/test/1", Priority.CONTROL, INITIAL_CREDIT_BYTES)
    stream.state = state
    return stream


def _message(size):
    return b"".join(encode_message({}, [bytes(size)]))


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", Transition)
def test_every_step_leads_where_the_table_says_or_blames_the_side_that_took_it(state, step):
    stream = _stream(state)
    after = TRANSITIONS[state].get(step)
    if after is None:
        with pytest.raises(RemoteProtocolError if step in FROM_PEER else LocalProtocolError):
            stream.step(step)
        after = state
    else:
        stream.step(step)
    assert stream.state is after


def test_a_stream_that_both_sides_finished_is_closed_and_nothing_more_may_come():
    stream = _stream()
    stream.note_sent(data=True, fin=True)
    stream.accept(DataFrame(1, memoryview(b"x"), fin=True))
    assert stream.state is State.CLOSED
    with pytest.raises(RemoteProtocolError, match="DATA on stream 1 in state CLOSED"):
        stream.accept(DataFrame(1, memoryview(b"x")))


def test_data_is_cut_at_credit_and_frame_size_and_never_spans_two_messages():
    outgoing = StreamOutbox(credit=30)
    outgoing.push({}, [bytes(11)], Priority.BULK)
    outgoing.push({}, [bytes(11)], Priority.DECODE)
    sizes = []
    while outgoing.ready:
        pieces, fin, ended = outgoing.cut(max_bytes=16)
        sizes.append((sum(map(len, pieces)), fin, ended))
    assert sizes == [(16, False, False), (4, False, True), (10, False, False)]
    assert (outgoing.credit, outgoing.unsent_bytes, outgoing.unsent_messages) == (0, 10, 1)
    outgoing.add_credit(100)
    assert outgoing.ready
    assert outgoing.priority(Priority.BULK) is Priority.DECODE


def test_the_end_travels_with_the_last_bytes_or_alone_and_once():
    outgoing = StreamOutbox(credit=100)
    outgoing.push({}, (), Priority.BULK)
    outgoing.finishing = True
    assert outgoing.cut(50)[1:] == (True, True)
    assert not outgoing.ready
    empty = StreamOutbox(credit=0)
    empty.finishing = True
    assert empty.ready
    assert empty.cut(50) == ([], True, False)
    assert not empty.ready


def test_more_credit_than_a_stream_can_use_is_refused():
    outgoing = StreamOutbox(credit=MAX_CREDIT)
    with pytest.raises(RemoteProtocolError, match="credit"):
        outgoing.add_credit(1)


def test_bytes_beyond_the_credit_are_refused():
    incoming = StreamInbox()
    incoming.accept(memoryview(bytes(INITIAL_CREDIT_BYTES)))
    with pytest.raises(RemoteProtocolError, match="more than its credit"):
        incoming.accept(memoryview(b"x"))


def test_credit_is_due_for_what_was_read_and_not_for_what_arrived():
    incoming = StreamInbox()
    message = memoryview(_message(INITIAL_CREDIT_BYTES - 9))
    incoming.accept(message[:40_000])
    incoming.accept(message[40_000:])
    assert incoming.wanted_credit(MAX_CREDIT) == 0
    assert incoming.read(MAX_WINDOW_BYTES)[1] == INITIAL_CREDIT_BYTES
    assert incoming.wanted_credit(MAX_CREDIT) == INITIAL_CREDIT_BYTES


def test_nothing_is_due_before_half_a_window_was_read():
    incoming = StreamInbox()
    incoming.accept(memoryview(_message(1000)))
    incoming.read(1000)
    assert incoming.wanted_credit(MAX_CREDIT) == 0
    assert incoming.outstanding == INITIAL_CREDIT_BYTES - 1009


def test_a_long_body_gets_credit_for_the_rest_once_it_is_read():
    incoming = StreamInbox()
    body = 10 * INITIAL_CREDIT_BYTES
    incoming.accept(memoryview(_message(body))[:1009])
    assert incoming.read(body) == (None, 1009)
    assert incoming.outstanding + incoming.wanted_credit(MAX_CREDIT) == body - 1000


def test_no_more_credit_is_given_than_the_line_can_hold():
    incoming = StreamInbox()
    body = 10 * INITIAL_CREDIT_BYTES
    incoming.accept(memoryview(_message(body))[:1009])
    incoming.read(body)
    assert incoming.outstanding + incoming.wanted_credit(3 * INITIAL_CREDIT_BYTES) == 3 * INITIAL_CREDIT_BYTES
    assert incoming.wanted_credit(0) == 0


def test_a_body_longer_than_the_reader_allows_gets_none():
    incoming = StreamInbox()
    incoming.accept(memoryview(_message(INITIAL_CREDIT_BYTES))[:1009])
    with pytest.raises(RemoteProtocolError, match="at most 1000 were expected"):
        incoming.read(1000)


def test_a_stream_of_long_messages_keeps_a_window_for_the_next():
    incoming = StreamInbox()
    body = 3 * INITIAL_CREDIT_BYTES
    incoming.accept(memoryview(_message(body))[:1009])
    incoming.read(body)
    incoming.outstanding += incoming.wanted_credit(MAX_CREDIT)
    incoming.accept(memoryview(bytes(body - 1000)))
    message, _ = incoming.read(body)
    assert len(message.body) == body
    assert incoming.outstanding == 0
    assert incoming.wanted_credit(MAX_CREDIT) == body


def test_a_peer_that_has_finished_is_given_no_credit():
    incoming = StreamInbox()
    incoming.accept(memoryview(_message(INITIAL_CREDIT_BYTES - 9)))
    incoming.finished = True
    incoming.read(INITIAL_CREDIT_BYTES)
    assert incoming.wanted_credit(MAX_CREDIT) == 0
    assert incoming.ended


def test_a_stream_must_not_end_within_a_message():
    incoming = StreamInbox()
    incoming.accept(memoryview(_message(10))[:-1])
    incoming.finished = True
    with pytest.raises(RemoteProtocolError, match="ended within a message"):
        incoming.read(10)


def test_single_bytes_cost_about_as_much_as_they_weigh():
    incoming = StreamInbox()
    pieces = [memoryview(bytes([n % 256])) for n in range(256)]
    tracemalloc.start()
    try:
        for n in range(INITIAL_CREDIT_BYTES):
            incoming.accept(pieces[n % 256])
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 2 * INITIAL_CREDIT_BYTES


@given(st.lists(st.integers(0, 2000), max_size=6), st.data())
def test_messages_come_out_as_they_went_in_however_their_bytes_arrive(sizes, data):
    incoming = StreamInbox()
    sent = b"".join(_message(size) for size in sizes)
    cuts = data.draw(st.lists(st.integers(0, len(sent)), max_size=30).map(sorted))
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        incoming.accept(memoryview(sent)[start:end])
        if data.draw(st.booleans()):
            message, _ = incoming.read(2000)
            received += [message] if message else []
    while (message := incoming.read(2000)[0]) is not None:
        received.append(message)
    assert [len(message.body) for message in received] == sizes
    assert incoming.buffered == 0
    assert incoming.outstanding == INITIAL_CREDIT_BYTES - len(sent)


def test_a_message_stays_as_it_was_while_small_pieces_are_added_behind_it():
    incoming = StreamInbox()
    data = memoryview(_message(3) + _message(4))
    for n in range(len(data)):
        incoming.accept(data[n : n + 1])
        if n == 11:
            first, _ = incoming.read(10)
    assert bytes(first.body) == bytes(3)
    assert len(incoming.read(10)[0].body) == 4


def test_repr_shows_what_waits():
    stream = _stream()
    stream.outgoing.push({}, [bytes(91)], Priority.BULK)
    assert repr(stream) == "<Stream 1 /test/1 OPEN unsent=100 credit=65536 unread=0>"

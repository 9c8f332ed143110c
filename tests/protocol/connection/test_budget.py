"""One budget for what peers make us hold: shared fairly, and always given back."""

import pytest

from peerd.protocol.connection.budget import FLOOR_BYTES, BufferBudget
from peerd.protocol.connection.frames import Priority
from peerd.protocol.connection.stream_queues import StreamInbox, StreamOutbox
from peerd.protocol.encoding.wire import FIRST_ALLOCATION_BYTES, encode_message
from peerd.protocol.errors import Overloaded, RemoteProtocolError

TOTAL = 100 * FLOOR_BYTES


def _fill(buffers, step=FLOOR_BYTES // 8):
    """Take as much as there is for one network; returns how much that was."""
    while True:
        try:
            buffers.take(step)
        except Overloaded:
            return buffers.held_bytes


def test_one_owner_gets_half_two_get_a_third_each_and_a_newcomer_finds_as_much():
    budget = BufferBudget(TOTAL)
    first, second = budget.open("a"), budget.open("b")
    assert _fill(first) == pytest.approx(TOTAL / 2, rel=0.02)
    assert _fill(second) == pytest.approx(TOTAL / 4, rel=0.05)
    first.give(first.held_bytes - TOTAL // 3)
    assert _fill(second) == pytest.approx(TOTAL / 3, rel=0.05)
    assert TOTAL - budget.used_bytes == pytest.approx(TOTAL / 3, rel=0.05)


def test_an_owners_connections_share_what_it_gets():
    budget = BufferBudget(TOTAL)
    connections = [budget.open("a") for _ in range(10)]
    for each in connections:
        _fill(each)
    assert budget.used_bytes == pytest.approx(TOTAL / 2, rel=0.05)


def test_without_a_name_each_is_an_owner_of_its_own():
    budget = BufferBudget(TOTAL)
    one, other = budget.open(), budget.open()
    _fill(one)
    assert _fill(other) == pytest.approx(TOTAL / 4, rel=0.05)


def test_a_small_question_is_heard_however_little_is_free():
    budget = BufferBudget(TOTAL)
    for number in range(60):
        _fill(budget.open(str(number)))
    late = budget.open("late")
    late.take(FLOOR_BYTES)
    with pytest.raises(Overloaded):
        late.take(1)


def test_what_is_ours_counts_and_is_never_refused():
    budget = BufferBudget(TOTAL)
    buffers = budget.open("a")
    buffers.hold(2 * TOTAL)
    with pytest.raises(Overloaded, match="free for others"):
        buffers.take(1)


def test_a_connection_that_ends_gives_everything_back_once():
    budget = BufferBudget(TOTAL)
    one, other = budget.open("a"), budget.open("a")
    one.take(1000)
    other.take(10)
    one.close()
    one.close()
    one.give(5)
    one.take(5)
    assert budget.used_bytes == 10
    other.close()
    assert repr(budget) == f"<BufferBudget 0/{TOTAL} owners=0>"


def _incoming(budget):
    buffers = budget.open("a")
    return StreamInbox(buffers), buffers


def test_what_waits_in_a_stream_is_held_until_it_is_read_or_dropped():
    incoming, buffers = _incoming(BufferBudget(TOTAL))
    message = b"".join(encode_message({"n": 1}, [bytes(1000)]))
    incoming.accept(memoryview(message))
    incoming.accept(memoryview(message))
    assert buffers.held_bytes == 2 * len(message)
    assert incoming.read(1000)[0] is not None
    assert buffers.held_bytes == len(message)
    incoming.drop()
    assert buffers.held_bytes == 0


def test_a_message_that_has_begun_holds_what_it_takes_until_it_is_whole():
    incoming, buffers = _incoming(BufferBudget(TOTAL))
    message = b"".join(encode_message({"n": 1}, [bytes(10_000)]))
    incoming.accept(memoryview(message)[:5])
    incoming.read(10_000)
    assert buffers.held_bytes == 5
    incoming.accept(memoryview(message)[5:-5000])
    assert incoming.read(10_000)[0] is None
    assert 5000 <= buffers.held_bytes <= 10_000
    incoming.accept(memoryview(message)[-5000:])
    assert incoming.read(10_000)[0] is not None
    assert buffers.held_bytes == 0


def test_a_message_that_does_not_come_to_its_end_is_given_back():
    incoming, buffers = _incoming(BufferBudget(TOTAL))
    message = b"".join(encode_message({"n": 1}, [bytes(10_000)]))
    incoming.accept(memoryview(message)[:-1])
    incoming.read(10_000)
    assert buffers.held_bytes == 9_999
    incoming.drop()
    assert buffers.held_bytes == 0


def test_a_malformed_message_is_given_back():
    incoming, buffers = _incoming(BufferBudget(TOTAL))
    incoming.accept(memoryview((9).to_bytes(4, "big") + b"\xc1" * 9 + bytes(4)))
    with pytest.raises(RemoteProtocolError):
        incoming.read(0)
    incoming.drop()
    assert buffers.held_bytes == 0


def test_a_claim_costs_four_kib_and_grows_as_it_is_filled():
    incoming, buffers = _incoming(BufferBudget(TOTAL))
    head = b"".join(encode_message({}))[:-4] + (2**20).to_bytes(4, "big")
    incoming.accept(memoryview(head + b"\0"))
    incoming.read(2**20)
    assert buffers.held_bytes == FIRST_ALLOCATION_BYTES
    incoming.accept(memoryview(bytes(5000)))
    incoming.read(2**20)
    assert buffers.held_bytes <= 2 * 5001 + FIRST_ALLOCATION_BYTES


def test_no_more_is_accepted_than_the_budget_allows():
    budget = BufferBudget(TOTAL)
    budget.open("others").hold(TOTAL)
    incoming, _ = _incoming(budget)
    incoming.outstanding = 2 * FLOOR_BYTES
    incoming.accept(memoryview(bytes(FLOOR_BYTES)))
    with pytest.raises(Overloaded):
        incoming.accept(memoryview(b"1"))


def test_an_answer_that_is_not_read_is_held():
    buffers = BufferBudget(TOTAL).open("a")
    outgoing = StreamOutbox(100, buffers)
    outgoing.push({}, [bytes(1000)], Priority.CONTROL)
    total = buffers.held_bytes
    assert total > 1000
    outgoing.cut(100)
    assert buffers.held_bytes == total - 100
    outgoing.drop()
    assert buffers.held_bytes == 0

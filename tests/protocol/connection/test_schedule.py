"""Which stream sends next: strict priority, turns within one, and slow ageing."""

from collections import Counter

from peerd.protocol.connection.frames import Priority
from peerd.protocol.connection.schedule import AGEING_FRAMES, Schedule


def _turns(schedule, streams, count):
    """The order in which streams send that always have more."""
    for stream_id, priority in streams.items():
        schedule.put(stream_id, priority)
    found = []
    for _ in range(count):
        stream_id = schedule.take()
        found.append(stream_id)
        schedule.put(stream_id, streams[stream_id])
    return found


def test_the_more_urgent_goes_first():
    schedule = Schedule()
    for stream_id, priority in enumerate(reversed(Priority)):
        schedule.put(stream_id, priority)
    assert [schedule.take() for _ in range(5)] == [3, 2, 1, 0, None]


def test_equals_take_turns():
    streams = {1: Priority.BULK, 3: Priority.BULK, 5: Priority.BULK}
    assert _turns(Schedule(), streams, 6) == [1, 3, 5, 1, 3, 5]


def test_bulk_beside_an_endless_stream_of_decodes_gets_a_little():
    turns = Counter(_turns(Schedule(), {1: Priority.DECODE, 3: Priority.BULK}, 100 * AGEING_FRAMES))
    assert 40 <= turns[3] <= 60


def test_a_waiting_stream_keeps_its_place_when_it_gets_more_to_send():
    schedule = Schedule()
    schedule.put(1, Priority.BULK)
    schedule.put(3, Priority.BULK)
    schedule.put(1, Priority.BULK)
    assert schedule.take() == 1


def test_a_stream_that_is_ready_with_something_else_changes_its_level():
    schedule = Schedule()
    schedule.put(1, Priority.BULK)
    schedule.put(3, Priority.PREFILL)
    schedule.put(1, Priority.DECODE)
    assert schedule.take() == 1
    assert len(schedule) == 1


def test_a_removed_stream_has_no_turn():
    schedule = Schedule()
    schedule.put(1, Priority.CONTROL)
    schedule.remove(1)
    schedule.remove(1)
    assert schedule.take() is None

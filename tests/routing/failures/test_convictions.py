from __future__ import annotations

import json

import pytest

from peerd.protocol.identity import Identity
from peerd.routing.failures.convictions import CONVICTED_S, MAX_CONVICTED, REMEMBERED_S, Convictions
from peerd.routing.failures.track_record import TrackRecord

A, B = (Identity.from_seed(bytes([number]) * 32).peer_id for number in (1, 2))


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_convicted_peer_is_avoided_for_a_day_whatever_it_does() -> None:
    clock = Clock()
    record = TrackRecord(clock, convictions=Convictions(clock))
    record.convictions.convict(A, "it lied")
    record.succeeded(A)
    record.answered(A)
    record.forgive()
    clock.now += CONVICTED_S - 1
    assert record.is_avoided(A)
    assert record.avoided() == {A}
    assert "it lied" in record.why_avoided(A)
    assert not record.is_avoided(B)
    clock.now += 1
    assert not record.is_avoided(A)
    assert record.avoided() == frozenset()
    assert record.why_avoided(A) == ""


def test_convictions_survive_a_restart_with_their_count() -> None:
    clock = Clock()
    before = Convictions(clock)
    before.convict(A, "first")
    clock.now += CONVICTED_S + 1
    before.convict(A, "again")
    before.convict(B, "it lied")
    clock.now += 60
    after = Convictions(clock)
    after.load(before.to_json())
    assert after.standing() == before.standing()
    assert {one.peer_id: (one.count, one.why) for one in after.standing()} == {A: (2, "again"), B: (1, "it lied")}
    assert after.peers() == {A, B}
    clock.now += CONVICTED_S + REMEMBERED_S
    assert json.loads(after.to_json())["convicted"] == []


def test_a_file_from_a_wrong_clock_convicts_for_a_day_at_most() -> None:
    early, late = Clock(), Clock()
    late.now += 1e9
    wrong = Convictions(late)
    wrong.convict(A, "it lied")
    after = Convictions(early)
    after.load(wrong.to_json())
    early.now += CONVICTED_S
    assert after.get(A) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "17",
        '{"peerd_convictions": 2, "convicted": []}',
        '{"peerd_convictions": 1}',
        '{"peerd_convictions": 1, "convicted": [{"peer": "x", "until": 1, "count": 1, "why": ""}]}',
        '{"peerd_convictions": 1, "convicted": [{"peer": 5, "until": 1, "count": 1, "why": ""}]}',
        '{"peerd_convictions": 1, "convicted": [7]}',
        "[" * 10_000,
    ],
)
def test_files_that_are_no_lists_of_convictions_are_refused(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        Convictions(Clock()).load(text)


def test_strangers_cannot_fill_the_memory() -> None:
    convictions = Convictions(Clock())
    for number in range(MAX_CONVICTED + 10):
        convictions.convict(Identity.from_seed(number.to_bytes(32, "big")).peer_id, "")
    assert len(convictions.standing()) == MAX_CONVICTED

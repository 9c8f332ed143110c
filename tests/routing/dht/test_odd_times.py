"""Whoever finds nobody because of a clock is told so."""

from __future__ import annotations

import pytest

from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, sign_record
from peerd.protocol.records.keys import server_key
from peerd.protocol.span import Span
from peerd.routing.dht.odd_times import MAX_CHECKED_A_LOOKUP, REMEMBERED_S, OddTimes

NOW = 1_800_000_000.0
MODEL = bytes(range(32))
KEY = server_key(MODEL, 0)
SERVER = Identity.from_seed(bytes(32))


def record(clock_s: float, *, who: Identity = SERVER, span: Span | None = None) -> bytes:
    """What a server announces whose clock differs from ours by so much."""
    body = ServerRecord(
        seq=1,
        expires=NOW + clock_s + 60,
        model=MODEL,
        span=span or Span(0, 4),
        state="online",
        dtype="float32",
        quantization="none",
        codecs=("exact",),
        throughput=1.0,
        free_tokens=1,
        max_length=1,
    )
    return sign_record(who, body).encode()


@pytest.mark.parametrize(
    ("clock_s", "said"), [(-3600, "1 h old"), (3600, "1 h ahead"), (-90, "90 s old"), (-7200, "2 h old")]
)
def test_it_says_whose_records_are_how_old(clock_s: float, said: str) -> None:
    odd = OddTimes()
    odd.note([record(clock_s)], KEY, NOW)
    expected = f"server {SERVER.peer_id}'s records are {said}: check its clock, or this machine's"
    assert odd.explain(MODEL, [(0, 8)], NOW) == [expected]


def test_it_says_nothing_of_other_blocks_other_models_and_what_was_long_ago() -> None:
    odd = OddTimes()
    odd.note([record(-3600)], KEY, NOW)
    assert odd.explain(MODEL, [(4, 8)], NOW) == []
    assert odd.explain(bytes(32), [(0, 8)], NOW) == []
    assert odd.explain(MODEL, [(0, 8)], NOW + REMEMBERED_S) == []


def test_records_that_nobody_signed_blame_nobody() -> None:
    odd = OddTimes()
    forged = record(-3600)[:-1] + b"x"
    addresses = sign_record(SERVER, PeerRecord(1, NOW - 4000, (), ())).encode()
    odd.note([forged, b"junk", addresses, record(-3600, span=Span(20, 24))], KEY, NOW)
    assert odd.explain(MODEL, [(0, 64)], NOW) == []


def test_a_heap_of_old_records_costs_few_checks() -> None:
    odd = OddTimes()
    heap = [record(-3600, who=Identity.from_seed(bytes([number]) * 32)) for number in range(10)]
    odd.note(heap, KEY, NOW)
    assert len(odd.explain(MODEL, [(0, 8)], NOW)) == MAX_CHECKED_A_LOOKUP

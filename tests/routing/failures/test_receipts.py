"""What clients acknowledged adds up, survives a restart, and takes bounded memory."""

from __future__ import annotations

import pytest

from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.receipts import RECEIPT_BYTES, Receipt
from peerd.routing.failures import receipts as module
from peerd.routing.failures.receipts import KEPT_DAYS, OTHERS, ReceiptBook

DAY_S = 86400.0
EPOCH = 1_800_000_000.0
MODEL, OTHER_MODEL = bytes(range(32)), bytes(32)
SERVER = PeerId("server")
SIGNED = bytes(RECEIPT_BYTES)


class Clock:
    def __init__(self) -> None:
        self.now = EPOCH

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> ReceiptBook:
    return ReceiptBook(clock)


def client(number: int) -> PeerId:
    return Identity.from_seed(number.to_bytes(32, "big")).peer_id


def add(book: ReceiptBook, peer: PeerId, positions: int, before: int = 0, model: bytes = MODEL) -> None:
    receipt = Receipt(bytes(16), 0, SERVER, model, 0, 4, positions)
    book.add(peer, receipt, SIGNED, positions - before, not before)


def totals(book: ReceiptBook) -> list[tuple[str, bytes, PeerId, int, int, int]]:
    return [
        (row.day.isoformat(), row.model, row.peer_id, row.sessions, row.positions, row.block_positions) for row in book
    ]


def test_receipts_add_up_by_day_model_and_client(book: ReceiptBook, clock: Clock) -> None:
    add(book, client(1), 100)
    add(book, client(1), 250, before=100)
    add(book, client(1), 30)
    add(book, client(1), 5, model=OTHER_MODEL)
    clock.now += DAY_S
    add(book, client(1), 7)
    assert totals(book) == [
        ("2027-01-15", OTHER_MODEL, client(1), 1, 5, 20),
        ("2027-01-15", MODEL, client(1), 2, 280, 1120),
        ("2027-01-16", MODEL, client(1), 1, 7, 28),
    ]


def test_totals_survive_a_restart(book: ReceiptBook, clock: Clock) -> None:
    add(book, client(1), 100)
    add(book, client(2), 50)
    again = ReceiptBook(clock)
    again.load(book.dump())
    assert totals(again) == totals(book)
    assert [row.receipt for row in again] == [SIGNED] * 2
    add(again, client(1), 1)
    assert sum(row.positions for row in again) == 151


def test_many_keys_take_bounded_memory_and_lose_no_position(
    book: ReceiptBook, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 8)
    for number in range(30):
        add(book, client(number), 10 + number)
    rows = list(book)
    assert len(rows) == 8
    assert sum(row.positions for row in rows) == sum(range(10, 40))
    # Who gave most keeps a row.
    assert {row.positions for row in rows if row.peer_id != OTHERS} == set(range(33, 40))
    for number in range(20):
        clock.now += DAY_S
        add(book, client(number), 1)
    assert len(list(book)) <= 8


def test_days_that_are_long_ago_are_forgotten(book: ReceiptBook, clock: Clock) -> None:
    add(book, client(1), 10)
    clock.now += (KEPT_DAYS + 1) * DAY_S
    add(book, client(1), 20)
    assert [row.positions for row in book] == [20]


GOOD = ["2027-01-15", MODEL.hex(), str(client(1)), 1, 5, 20, ""]


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, "yesterday"), (0, 5), (1, "ff"), (1, "zz"), (2, "me"), (3, -1), (4, "5"), (5, 2**70), (6, "?"), (6, "AAAA")],
    ids=str,
)
def test_a_damaged_row_is_refused(book: ReceiptBook, at: int, value: object) -> None:
    import json

    book.load(json.dumps({"peerd_receipts": 1, "rows": [GOOD]}))
    row = [*GOOD[:at], value, *GOOD[at + 1 :]]
    with pytest.raises(ValueError, match=r"."):
        book.load(json.dumps({"peerd_receipts": 1, "rows": [row]}))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"peerd_receipts": 2, "rows": []}', '{"peerd_receipts": 1}', "[" * 9999]
)
def test_a_file_that_is_no_list_of_receipts_is_refused(book: ReceiptBook, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        book.load(text)

"""`peerd receipts`: totals for people and for programs, from the state directory of a daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peerd.cli.main import cli
from peerd.protocol.identity import Identity
from peerd.protocol.messages.receipts import Receipt, open_receipt, sign_receipt
from peerd.routing.failures.receipts import ReceiptBook

EPOCH = 1_800_000_000.0
MODEL = bytes(range(32))
SERVER, ONE, OTHER = (Identity.from_seed(bytes([seed]) * 32) for seed in (1, 2, 3))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """The key file of a daemon to which two clients acknowledged something."""
    book = ReceiptBook(lambda: EPOCH)
    for identity, positions in ((ONE, 10), (OTHER, 300)):
        receipt = Receipt(bytes(16), 0, SERVER.peer_id, MODEL, 0, 4, positions)
        book.add(identity.peer_id, receipt, sign_receipt(identity, receipt), positions, True)
    (tmp_path / "a.state").mkdir()
    (tmp_path / "a.state/receipts.json").write_text(book.dump())
    return tmp_path / "a.key"


def run(key: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["receipts", "--identity", str(key), *arguments])


def test_totals_are_listed_by_day_model_and_client(key: Path) -> None:
    result = run(key)
    assert result.exit_code == 0
    words = [line.split() for line in result.stdout.splitlines()]
    assert ["2027-01-15", "2", "310", "1240"] in words
    assert ["000102030405", "2", "310", "1240"] in words
    clients = words[words.index(["client", "sessions", "positions", "positions", "x", "blocks"]) + 1 :]
    assert [(line[0][-4:], line[2]) for line in clients] == [
        (OTHER.peer_id[-4:], "300"),
        (ONE.peer_id[-4:], "10"),
    ]


def test_programs_get_every_row_and_the_signed_receipts(key: Path) -> None:
    import base64

    found = json.loads(run(key, "--json").stdout)
    assert found["total"] == {"sessions": 2, "positions": 310, "block_positions": 1240}
    for row in found["rows"]:
        receipt = open_receipt(base64.b64decode(row["receipt"]), client=row["peer_id"])
        assert receipt.positions == row["positions"]
        assert (row["day"], row["model"]) == ("2027-01-15", MODEL.hex())


def test_without_receipts_it_says_so(tmp_path: Path) -> None:
    assert run(tmp_path / "b.key").stdout == "no client has acknowledged anything yet\n"


def test_a_damaged_file_is_named(key: Path) -> None:
    (key.parent / "a.state/receipts.json").write_text("{}")
    result = run(key)
    assert result.exit_code == 2
    assert "a.state/receipts.json" in result.stderr

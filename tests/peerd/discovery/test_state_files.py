"""A peer's state files, on every kind of broken disk and with every kind of content."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from peerd.discovery.state_files import (
    CONTACTS_FILE,
    CONTRIBUTIONS_FILE,
    CONVICTIONS_FILE,
    RECEIPTS_FILE,
    SEQ_FILE,
    WRITE_S,
    StateFiles,
    ThreadWriter,
    write_durably,
)
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.receipts import RECEIPT_BYTES, Receipt
from peerd.routing.failures.contributions import Contributions
from peerd.routing.failures.convictions import Convictions
from peerd.routing.failures.receipts import ReceiptBook
from peerd.routing.failures.track_record import TrackRecord

FULL = OSError(errno.ENOSPC, "No space left on device")

FOREIGN = {
    "no UTF-8": b"\xff\xfe\x00\x81" * 8,
    "nothing": b"",
    "zeros, as after a power cut": bytes(4096),
    "half of a list": b'{"version": 1, "contacts": [{"peer_id": "12D3',
    "lists without end": b"[" * 200_000,
    "a number in place of an object": b"17",
    "a number that Python does not read": b"9" * 5000,
    "a seq that no record can carry": str(2**63).encode(),
    "a negative number": b"-1",
}


class FakeDisk:
    """Takes what is written, unless `error` is set. `written` has all that arrived."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.written: list[tuple[str, str]] = []

    async def write(self, path: Path, text: str) -> None:
        if self.error is not None:
            raise self.error
        self.written.append((path.name, text))


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_a_file_with_foreign_bytes_counts_as_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / CONTACTS_FILE).write_bytes(data)
    (tmp_path / SEQ_FILE).write_bytes(data if data != b"17" else b"[17]")
    assert StateFiles(tmp_path).load_contacts() == []
    assert StateFiles(tmp_path).load() == 0
    (tmp_path / CONVICTIONS_FILE).write_bytes(data)
    convictions = Convictions(lambda: 0.0)
    StateFiles(tmp_path).load_convictions(convictions)
    assert convictions.standing() == []


@pytest.mark.real_time
async def test_convicted_peers_are_avoided_after_a_restart(tmp_path: Path) -> None:
    liar = Identity.from_seed(bytes(32)).peer_id
    before = Convictions(lambda: 0.0)
    before.convict(liar, "it lied")
    await StateFiles(tmp_path).save_convictions(before)
    after = Convictions(lambda: 3600.0)
    StateFiles(tmp_path).load_convictions(after)
    assert TrackRecord(trio.current_time, convictions=after).avoided() == {liar}


def test_a_file_that_cannot_be_read_counts_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / CONTACTS_FILE).mkdir()
    (tmp_path / SEQ_FILE).mkdir()
    assert StateFiles(tmp_path).load_contacts() == []
    assert StateFiles(tmp_path).load() == 0
    assert f"cannot read {tmp_path / SEQ_FILE}: Is a directory" in caplog.text


async def test_what_was_saved_is_there_after_a_restart(tmp_path: Path) -> None:
    async def write(path: Path, text: str) -> None:
        write_durably(path, text)

    await StateFiles(tmp_path / "new", write).save(123_456)
    assert StateFiles(tmp_path / "new").load() == 123_456


async def test_a_failure_is_said_once_and_the_next_save_tries_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "peerd")
    disk = FakeDisk()
    files = StateFiles(tmp_path, disk.write)
    disk.error = FULL
    for seq in range(5):
        await files.save(seq)
    assert caplog.text.count("cannot write") == 1
    assert f"cannot write {tmp_path / SEQ_FILE}: No space left on device" in caplog.text
    disk.error = None
    await files.save(5)
    assert disk.written == [(SEQ_FILE, "5\n")]
    assert f"{tmp_path / SEQ_FILE} is written again" in caplog.text
    disk.error = OSError(errno.EROFS, "Read-only file system")
    await files.save(6)
    assert caplog.text.count("cannot write") == 2


async def test_a_machine_without_a_thread_left_costs_only_the_write(tmp_path: Path) -> None:
    disk = FakeDisk()
    disk.error = RuntimeError("can't start new thread")
    await StateFiles(tmp_path, disk.write).save(1)


async def test_the_same_text_is_written_once(tmp_path: Path) -> None:
    disk = FakeDisk()
    files = StateFiles(tmp_path, disk.write)
    await files.save(1)
    await files.save(1)
    assert len(disk.written) == 1


async def test_after_a_failed_write_the_same_text_is_written_again(tmp_path: Path) -> None:
    disk = FakeDisk()
    files = StateFiles(tmp_path, disk.write)
    await files.save(1)
    disk.error = FULL
    await files.save(2)
    disk.error = None
    await files.save(1)
    assert disk.written == [(SEQ_FILE, "1\n")] * 2


async def test_a_disk_that_hangs_is_waited_for_five_seconds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def hang(path: Path, text: str) -> None:
        await trio.sleep_forever()

    await StateFiles(tmp_path, hang).save(1)
    assert trio.current_time() == pytest.approx(WRITE_S)
    assert "has not answered" in caplog.text


@pytest.mark.real_time
@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "ends in a moment"])
async def test_a_file_is_not_written_again_while_its_last_write_of_a_cancelled_caller_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    goes_on, started = threading.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def hang(fd: int) -> None:
        token.run_sync_soon(started.set)
        goes_on.wait(10)

    monkeypatch.setattr(os, "fsync", hang)
    writer = ThreadWriter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer, tmp_path / SEQ_FILE, "1")
        await started.wait()
        nursery.cancel_scope.cancel()
    if hangs:
        with pytest.raises(OSError, match="last write to this file still hangs"):
            await writer(tmp_path / SEQ_FILE, "2")
        goes_on.set()
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer, tmp_path / SEQ_FILE, "2")
        await trio.testing.wait_all_tasks_blocked()
        goes_on.set()
    assert (tmp_path / SEQ_FILE).read_text() == "2"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_text_and_no_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / SEQ_FILE
    write_durably(path, "old")

    def fail(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == [SEQ_FILE]
    assert path.read_text() == "old"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(fd: int) -> None:
        happened.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def rename(old: str, new: Path) -> None:
        happened.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    write_durably(tmp_path / SEQ_FILE, "1")
    assert happened == ["file", "rename", "folder"]


async def test_what_peers_gave_us_survives_a_restart_but_not_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = Contributions(trio.current_time)
    given.served_us(PeerId("a"))
    disk = FakeDisk()
    await StateFiles(tmp_path, disk.write).save_contributions(given)
    assert disk.written == [(CONTRIBUTIONS_FILE, given.dump())]
    (tmp_path / CONTRIBUTIONS_FILE).write_text(given.dump())
    again = Contributions(trio.current_time)
    StateFiles(tmp_path).load_contributions(again)
    assert again.weight(PeerId("a")) == given.weight(PeerId("a")) > 1
    (tmp_path / CONTRIBUTIONS_FILE).write_bytes(b"[[\xff")
    again = Contributions(trio.current_time)
    StateFiles(tmp_path).load_contributions(again)
    assert again.weight(PeerId("a")) == 1
    assert f"cannot use {tmp_path / CONTRIBUTIONS_FILE}" in caplog.text


async def test_what_clients_acknowledged_survives_a_restart_but_not_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book, disk = ReceiptBook(lambda: 1_800_000_000.0), FakeDisk()
    files = StateFiles(tmp_path, disk.write)
    await files.save_receipts(book)
    assert disk.written == []
    client = Identity.from_seed(bytes(32)).peer_id
    book.add(client, Receipt(bytes(16), 0, client, bytes(32), 0, 4, 10), bytes(RECEIPT_BYTES), 10, True)
    await files.save_receipts(book)
    assert disk.written == [(RECEIPTS_FILE, book.dump())]
    (tmp_path / RECEIPTS_FILE).write_text(book.dump())
    again = ReceiptBook(lambda: 1_800_000_000.0)
    StateFiles(tmp_path).load_receipts(again)
    assert list(again) == list(book)
    (tmp_path / RECEIPTS_FILE).write_bytes(b"{\xff")
    again = ReceiptBook(lambda: 1_800_000_000.0)
    StateFiles(tmp_path).load_receipts(again)
    assert list(again) == []
    assert f"cannot use {tmp_path / RECEIPTS_FILE}" in caplog.text

"""The files in which a peer saves its sequence number, its contacts, whom it convicted, what peers gave it, and what
its clients acknowledged.

A peer works without them. A disk that is full, read-only or broken, or a damaged file, costs a warning and a slower
start. What could not be written stays in memory and is written with the next save.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from peerd.routing.dht.dht import Dht
from peerd.routing.dht.table import Contact, load_contacts
from peerd.routing.failures.contributions import Contributions
from peerd.routing.failures.convictions import Convictions
from peerd.routing.failures.receipts import ReceiptBook

log = logging.getLogger(__name__)

SEQ_FILE: Final = "seq"
CONTACTS_FILE: Final = "contacts.json"
CONVICTIONS_FILE: Final = "convictions.json"
CONTRIBUTIONS_FILE: Final = "contributions.json"
RECEIPTS_FILE: Final = "receipts.json"
# A disk that takes longer is hanging (a network file system, a dying card). Announcements must not wait for it: they
# would expire.
WRITE_S: Final = 5.0
# How long the write of a caller who was cancelled is waited for before it counts as hanging.
ABANDONED_S: Final = 0.25
_LOOK_S: Final = 0.01
# 10 000 contacts with four addresses each take 3 MB; a larger file was not written by us.
MAX_FILE_BYTES: Final = 16 * 2**20
# A greater `seq` in the file is damage: ours count microseconds, and a record can carry at most 2^63 - 1.
MAX_KEPT_SEQ: Final = 2**62

Write = Callable[[Path, str], Awaitable[None]]
"""Replaces a file atomically. Raises OSError, or RuntimeError if the system cannot start a thread."""


class StateFiles:
    """The state that survives a restart, in a directory: the routing table, the last `seq`, the convictions, what
    peers gave us, and what clients acknowledged. None saves nothing.

    No method raises. `write` replaces a file; the default does so in a worker thread.
    """

    def __init__(self, directory: Path | None, write: Write | None = None) -> None:
        self._directory = directory
        self._write = write or ThreadWriter()
        # For each file, the text that is on disk, as far as we know; and the files whose last write failed.
        self._written: dict[str, str] = {}
        self._failing: set[str] = set()

    def load(self) -> int:
        """The last `seq`. 0 if none was saved or the file is damaged: then only the clock ensures that `seq` does not
        go back.
        """
        text = self._read(SEQ_FILE).strip()
        if not text:
            return 0
        # `int` refuses to parse more than 4300 digits.
        seq = int(text) if text.isdecimal() and len(text) < 100 else MAX_KEPT_SEQ
        if seq >= MAX_KEPT_SEQ:
            log.warning("cannot use %s: it holds no sequence number", self._path(SEQ_FILE))
            return 0
        return seq

    async def save(self, seq: int) -> None:
        """Save `seq` so that it survives a power cut. Waits at most 5 s for the disk."""
        await self._save(SEQ_FILE, f"{seq}\n")

    def load_contacts(self) -> list[Contact]:
        """The contacts saved at the last stop. None if the file is missing or damaged, which only makes the start
        slower.
        """
        text = self._read(CONTACTS_FILE)
        try:
            return load_contacts(text) if text else []
        except (ValueError, RecursionError) as error:
            log.warning("cannot use %s: %s", self._path(CONTACTS_FILE), error)
            return []

    async def save_contacts(self, dht: Dht) -> None:
        """Save the routing table. Waits at most 5 s for the disk."""
        # If the table is empty, the contacts saved before are more useful.
        if dht.contacts:
            await self._save(CONTACTS_FILE, dht.dump())

    def load_convictions(self, convictions: Convictions) -> None:
        """Add the convictions that were saved; none if the file is missing or damaged."""
        text = self._read(CONVICTIONS_FILE)
        try:
            if text:
                convictions.load(text)
        except (ValueError, RecursionError) as error:
            log.warning("cannot use %s: %s", self._path(CONVICTIONS_FILE), error)

    async def save_convictions(self, convictions: Convictions) -> None:
        """Save the convictions. Waits at most 5 s for the disk."""
        await self._save(CONVICTIONS_FILE, convictions.to_json())

    def load_contributions(self, contributions: Contributions) -> None:
        """Take back what peers gave us before the last stop, as far as it was saved."""
        text = self._read(CONTRIBUTIONS_FILE)
        try:
            if text:
                contributions.load(text)
        except ValueError as error:
            log.warning("cannot use %s: %s", self._path(CONTRIBUTIONS_FILE), error)

    async def save_contributions(self, contributions: Contributions) -> None:
        """Save what peers gave us. Waits at most 5 s for the disk."""
        await self._save(CONTRIBUTIONS_FILE, contributions.dump())

    def load_receipts(self, receipts: ReceiptBook) -> None:
        """Add what our clients acknowledged before the last stop, as far as it was saved."""
        text = self._read(RECEIPTS_FILE)
        try:
            if text:
                receipts.load(text)
        except ValueError as error:
            log.warning("cannot use %s: %s", self._path(RECEIPTS_FILE), error)

    async def save_receipts(self, receipts: ReceiptBook) -> None:
        """Save what our clients acknowledged, if that is anything. Waits at most 5 s for the disk."""
        if receipts.is_used:
            await self._save(RECEIPTS_FILE, receipts.dump())

    def _path(self, name: str) -> Path:
        assert self._directory is not None
        return self._directory / name

    def _read(self, name: str) -> str:
        if self._directory is None:
            return ""
        try:
            with self._path(name).open("rb") as file:
                return file.read(MAX_FILE_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            log.warning("cannot read %s: %s", self._path(name), error.strerror or error)
            return ""

    async def _save(self, name: str, text: str) -> None:
        if self._directory is None or self._written.get(name) == text:
            return
        # A write that timed out may still happen later, so what the disk holds is unknown until a write succeeds.
        self._written.pop(name, None)
        why: object = f"the disk has not answered for {WRITE_S:g} s"
        with trio.move_on_after(WRITE_S):
            try:
                await self._write(self._path(name), text)
            except OSError as error:
                why = error.strerror or error
            except RuntimeError as error:
                why = error
            else:
                self._written[name] = text
                self._note_success(name)
                return
        self._note_failure(name, why)

    def _note_success(self, name: str) -> None:
        if name in self._failing:
            self._failing.discard(name)
            log.info("%s is written again", self._path(name))

    def _note_failure(self, name: str, why: object) -> None:
        """Warn about the file once; warn again only after a write has succeeded."""
        if name not in self._failing:
            self._failing.add(name)
            log.warning(
                "cannot write %s: %s; its content is kept in memory, and is lost if this peer stops before it"
                " can be written",
                self._path(name),
                why,
            )


class ThreadWriter:
    """Replaces files durably in a worker thread, which is abandoned when the caller is cancelled.

    While a file's last write hangs, the file is not written again: threads would pile up, and end in any order.
    """

    def __init__(self) -> None:
        self._running: set[Path] = set()

    async def __call__(self, path: Path, text: str) -> None:
        with trio.move_on_after(ABANDONED_S):
            while path in self._running:  # noqa: ASYNC110  # a thread ends it
                await trio.sleep(_LOOK_S)
        if path in self._running:
            raise OSError(errno.EBUSY, "the last write to this file still hangs")
        await trio.to_thread.run_sync(self._write, path, text, abandon_on_cancel=True)

    def _write(self, path: Path, text: str) -> None:
        self._running.add(path)
        try:
            write_durably(path, text)
        finally:
            self._running.discard(path)


def write_durably(path: Path, text: str) -> None:
    """Replace a file so that after a power cut it has either the old text or the new one. Blocks. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        # Temporary files must not fill up a full disk.
        with suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a file's new name durable, on file systems that can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

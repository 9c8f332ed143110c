"""The files in which a peer remembers its sequence number and its contacts.

A peer works without them: a disk that is full, read-only or broken, and a file that holds anything at all, cost a
warning and a slower start. What could not be written stays in memory and is written with the next save.
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

log = logging.getLogger(__name__)

SEQ_FILE: Final = "seq"
CONTACTS_FILE: Final = "contacts.json"
# A disk that takes longer hangs (a network file system, a dying card). Announcements must not wait for it: they would
# expire.
WRITE_S: Final = 5.0
# 10 000 contacts with four addresses each are 3 MB; what is larger was not written by us.
MAX_FILE_BYTES: Final = 16 * 2**20
# A greater `seq` in the file is damage. Ours count microseconds, and records cannot carry more than 2^63 - 1.
MAX_KEPT_SEQ: Final = 2**62

Write = Callable[[Path, str], Awaitable[None]]
"""Replaces a file, whole or not at all. Raises OSError; RuntimeError where the system has no thread left."""


class StateFiles:
    """What outlives a restart: the routing table and the last `seq`, in a directory; or nothing, without one.

    No method raises. `write` replaces a file; the default does so in a worker thread.
    """

    def __init__(self, directory: Path | None, write: Write | None = None) -> None:
        self._directory = directory
        self._write = write or ThreadWriter()
        # What the disk holds, by file, as far as we wrote it; and the files that could not be written last.
        self._written: dict[str, str] = {}
        self._failing: set[str] = set()

    def load(self) -> int:
        """The last `seq`; 0 if none was kept, or the file is damaged: then the clock alone must not go back."""
        text = self._read(SEQ_FILE).strip()
        if not text:
            return 0
        # 4300 digits are the most that `int` reads.
        seq = int(text) if text.isdecimal() and len(text) < 100 else MAX_KEPT_SEQ
        if seq >= MAX_KEPT_SEQ:
            log.warning("cannot use %s: it holds no sequence number", self._path(SEQ_FILE))
            return 0
        return seq

    async def save(self, seq: int) -> None:
        """Keep `seq`, so that it survives a power cut. Waits 5 s for the disk at most."""
        await self._save(SEQ_FILE, f"{seq}\n")

    def load_contacts(self) -> list[Contact]:
        """The peers known before; none if the file is missing or damaged, which costs only a slower start."""
        text = self._read(CONTACTS_FILE)
        try:
            return load_contacts(text) if text else []
        except (ValueError, RecursionError) as error:
            log.warning("cannot use %s: %s", self._path(CONTACTS_FILE), error)
            return []

    async def save_contacts(self, dht: Dht) -> None:
        """Keep the routing table. Waits 5 s for the disk at most."""
        # An empty table is no reason to forget whom we knew.
        if dht.contacts:
            await self._save(CONTACTS_FILE, dht.dump())

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
        # A write that is given up may still happen: what the disk holds is unknown until one has succeeded.
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
        """Say it once, until a write succeeds again."""
        if name not in self._failing:
            self._failing.add(name)
            log.warning(
                "cannot write %s: %s; what belongs there is kept in memory, and lost if this peer stops before it"
                " can be written",
                self._path(name),
                why,
            )


class ThreadWriter:
    """Replaces files durably in a worker thread, which is left behind when the caller is cancelled.

    A file whose last write still hangs is not written again: threads would pile up, and finish in any order.
    """

    def __init__(self) -> None:
        self._running: set[Path] = set()

    async def __call__(self, path: Path, text: str) -> None:
        if path in self._running:
            raise OSError(errno.EBUSY, "the disk has not answered to the write before")
        await trio.to_thread.run_sync(self._write, path, text, abandon_on_cancel=True)

    def _write(self, path: Path, text: str) -> None:
        self._running.add(path)
        try:
            write_durably(path, text)
        finally:
            self._running.discard(path)


def write_durably(path: Path, text: str) -> None:
    """Replace a file so that a power cut leaves the old text or the new one. Blocks. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        # A full disk must not fill with pieces.
        with suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a file's new name durable. Some file systems cannot, and need not be told."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

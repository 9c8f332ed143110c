"""Records which files of the cache peerd fetched and when each was last used, and decides which may be deleted.

There is one ledger for all of a user's peerd processes. They start, run and die at any time, beside other programs that
use the same cache. So three rules hold:

- A process that reads or fetches a file holds a lock on that file, which the system drops when the process ends.
- A file is deleted, locked for reading or renamed only while the ledger itself is locked.
- A file that is not the one we wrote (another inode or modification time) is not ours, and is never deleted.

The least recently used file is deleted first.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from peerd.compute.checkpoint.hub.cache import PARTIAL_SUFFIX, HubCache, forget
from peerd.compute.checkpoint.hub.file_locks import hold, lock_if_unused, lock_to_write, share
from peerd.compute.checkpoint.hub.http import Fetchable
from peerd.compute.device.sizes import format_size
from peerd.compute.errors import CheckpointError, DiskFullError

log = logging.getLogger(__name__)

# We leave this much of the disk free, because other programs write there too.
_LEAVE_FREE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that peerd fetched or is fetching. `used` is a unix time.

    While it is being fetched, `size` is its final size and `mtime_ns` is 0.
    """

    size: int
    used: float
    inode: int
    mtime_ns: int = 0


@dataclass(slots=True)
class Claims:
    """What `DiskLedger.claim` did with each file, by name; values are file descriptors.

    held: the file is here, and locked for reading.
    mine: we are to fetch the file, and hold the lock for that.
    elsewhere: another process is fetching the file.
    """

    held: dict[str, int] = field(default_factory=dict)
    mine: dict[str, int] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)


class DiskLedger:
    """The ledger in `folder`. Several may be open on one folder, in one process or in many."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._now = now

    def claim(
        self, cache: HubCache, commit: str, files: Sequence[Fetchable], *, disk_bytes: int | None, offline: bool = False
    ) -> Claims:
        """Lock the files that are here for reading. Make room for the missing ones, and lock them for fetching.

        `disk_bytes` limits the total size of peerd's files. Raises DiskFullError or CheckpointError; then nothing is
        locked.
        """
        claims = Claims()
        with self._open(must=disk_bytes is not None) as entries:
            try:
                for file in files:
                    self._claim_one(entries, claims, cache, commit, file, offline)
                mine = [file for file in files if file.name in claims.mine]
                if mine:
                    held = [file for file in files if file.name in claims.held]
                    self._make_room(entries, cache, mine, held, disk_bytes)
                    for file in mine:
                        inode = os.fstat(claims.mine[file.name]).st_ino
                        entries[str(cache.blob(file))] = Entry(file.size, self._now(), inode)
            except BaseException:
                for name, fd in [*claims.held.items(), *claims.mine.items()]:
                    if name in claims.mine and os.fstat(fd).st_size == 0:
                        _partial_of(cache, files, name).unlink(missing_ok=True)
                    os.close(fd)
                raise
        return claims

    def publish(self, cache: HubCache, commit: str, file: Fetchable, fd: int) -> None:
        """Give a completely fetched file its final name, and hold it for reading from now on."""
        with self._open() as entries:
            try:
                # Where locks don't work, another process may have been faster; it wrote the same bytes.
                if cache.partial(file).exists() or not cache.blob(file).is_file():
                    os.replace(cache.partial(file), cache.blob(file))
                cache.link(commit, file)
            except OSError as error:
                raise CheckpointError(f"{cache.blob(file)}: cannot be written: {error.strerror}") from error
            status = os.fstat(fd)
            entries[str(cache.blob(file))] = Entry(file.size, self._now(), status.st_ino, status.st_mtime_ns)
            share(fd)

    def entries(self) -> Mapping[Path, Entry]:
        """The files that are peerd's now, by path."""
        with self._open() as entries:
            _drop_what_is_not_ours(entries)
            return {Path(path): entry for path, entry in entries.items()}

    def _claim_one(
        self, entries: dict[str, Entry], claims: Claims, cache: HubCache, commit: str, file: Fetchable, offline: bool
    ) -> None:
        pointer, blob = cache.snapshot(commit) / file.name, cache.blob(file)
        try:
            if not pointer.exists() and blob.is_file():
                cache.link(commit, file)
            if pointer.exists():
                claims.held[file.name] = hold(pointer)
                if (entry := entries.get(str(blob))) is not None:
                    entries[str(blob)] = replace(entry, used=self._now())
            elif not offline:
                fd = lock_to_write(cache.partial(file))
                if fd is None:
                    claims.elsewhere.append(file.name)
                else:
                    claims.mine[file.name] = fd
        except OSError as error:
            raise CheckpointError(f"{pointer}: cannot be used: {error.strerror}") from error

    def _make_room(
        self,
        entries: dict[str, Entry],
        cache: HubCache,
        files: Sequence[Fetchable],
        held: Sequence[Fetchable],
        disk_bytes: int | None,
    ) -> None:
        """Delete the least recently used files until `files` fit beside `held`. Raises DiskFullError before it deletes
        anything.
        """
        _drop_what_is_not_ours(entries)
        wanted = {str(cache.blob(file)): file.size for file in files}
        size = sum(wanted.values())
        free = _free_bytes(cache.folder) + sum(_size(cache.partial(file)) for file in files) - _LEAVE_FREE_BYTES
        others = {path: entry for path, entry in entries.items() if path not in wanted}
        taken = sum(entry.size for entry in others.values())
        too_few, too_many = size - free, 0 if disk_bytes is None else taken + size - disk_bytes
        with ExitStack() as locks:
            doomed: list[str] = []
            at_once = size + sum(file.size for file in held if str(cache.blob(file)) in entries)
            if disk_bytes is not None and at_once <= disk_bytes:
                for path in sorted(others, key=lambda path: others[path].used):
                    if too_few <= 0 and too_many <= 0:
                        break
                    if (fd := _lock_to_delete(Path(path))) is not None:
                        locks.callback(os.close, fd)
                        doomed.append(path)
                        too_few -= os.fstat(fd).st_size
                        too_many -= others[path].size
            if too_few > 0 or too_many > 0:
                raise DiskFullError(_what_does_not_fit(cache, size, at_once, free, taken, disk_bytes))
            for path in doomed:
                _delete(Path(path))
                log.info("deleted %s, used least recently: room for %s", path, cache.repo)
                del entries[path]

    @contextmanager
    def _open(self, *, must: bool = False) -> Iterator[dict[str, Entry]]:
        """Lock the ledger and yield its entries by path; changes to them are saved.

        If the ledger cannot be opened: raises CheckpointError if it `must` be, otherwise yields an empty one that is
        not saved.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder / "ledger.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if must:
                raise CheckpointError(
                    f"{self._folder}: cannot be written ({error.strerror}), but --disk needs it"
                ) from error
            # Without --disk there is no limit to enforce; only the list of files that we may delete is lost.
            yield {}
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._read()
            entries = dict(before)
            try:
                yield entries
            finally:
                if entries != before:
                    self._write(entries)
        finally:
            os.close(lock)

    def _read(self) -> dict[str, Entry]:
        try:
            raw = json.loads((self._folder / "ledger.json").read_bytes())
            return {
                path: Entry(int(e["size"]), float(e["used"]), int(e["inode"]), int(e["mtime_ns"]))
                for path, e in raw.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # A file that may not be ours is never deleted.
            log.warning("%s is damaged: what it listed will not be deleted by --disk", self._folder / "ledger.json")
            return {}

    def _write(self, entries: Mapping[str, Entry]) -> None:
        with suppress(OSError):
            with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False) as file:
                json.dump({path: asdict(entry) for path, entry in entries.items()}, file)
            os.replace(file.name, self._folder / "ledger.json")


def _lock_to_delete(blob: Path) -> int | None:
    """Lock one of our files, whole or partial, against all other processes; None if one of them uses it."""
    path = _where(blob)
    return None if path is None else lock_if_unused(path)


def _delete(blob: Path) -> None:
    path = _where(blob)
    try:
        if path is not None:
            forget(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be deleted to make room: {error.strerror}") from error


def _where(blob: Path) -> Path | None:
    """The path of an entry's file, whole or partial; None if it was deleted."""
    partial = blob.with_name(blob.name + PARTIAL_SUFFIX)
    return next((path for path in (blob, partial) if path.is_file()), None)


def _drop_what_is_not_ours(entries: dict[str, Entry]) -> None:
    for path, entry in list(entries.items()):
        found = _where(Path(path))
        if found is None or not (found != Path(path) or _is_the_one(found, entry)):
            del entries[path]


def _is_the_one(blob: Path, entry: Entry) -> bool:
    """Whether this is still the file that we wrote: another program may have emptied the cache and filled it again."""
    status = blob.lstat()
    # Inode numbers are reused, so the time must match too. It is 0 if a process died while it renamed the file.
    return status.st_ino == entry.inode and entry.mtime_ns in (0, status.st_mtime_ns)


def _partial_of(cache: HubCache, files: Sequence[Fetchable], name: str) -> Path:
    return cache.partial(next(file for file in files if file.name == name))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _what_does_not_fit(cache: HubCache, size: int, at_once: int, free: int, taken: int, disk_bytes: int | None) -> str:
    what = f"{cache.repo}: {format_size(size)} have to be fetched"
    if disk_bytes is None:
        return (
            f"{what}, and {format_size(max(free, 0))} are free below {cache.folder.parent}: free some, set HF_HOME to"
            " another disk, or let peerd delete what it fetched before with --disk SIZE"
        )
    if at_once > disk_bytes:
        beside = f" beside {format_size(at_once - size)} that are here and needed too" if at_once > size else ""
        return f"{what}{beside}, and --disk allows {format_size(disk_bytes)}: raise it, or serve fewer blocks"
    return (
        f"{what}, and of the {format_size(disk_bytes)} that --disk allows {format_size(taken)} are taken by files that"
        f" running peers use ({format_size(max(free, 0))} are free on the disk): raise --disk, or stop one of them"
    )

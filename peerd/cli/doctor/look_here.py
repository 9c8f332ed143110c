"""Reads the facts about this machine: files, disk, memory, limits, packages. Changes nothing, and waits for nothing."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import stat
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from peerd.cli.daemon import state_dir
from peerd.cli.doctor.facts import FileFact, FolderFact, KeyFact, LimitsFact, PackageFact
from peerd.cli.keys.identity_file import KeyFileError, peer_id_in
from peerd.cli.process_limits import WANTED_FILES
from peerd.discovery.state_files import (
    CONTACTS_FILE,
    CONTRIBUTIONS_FILE,
    CONVICTIONS_FILE,
    MAX_FILE_BYTES,
    MAX_KEPT_SEQ,
    SEQ_FILE,
)
from peerd.net.limits.gate import MAX_CONNECTIONS, connection_limits

_LEAST_TOKEN_CHARS = 16


def look_at_key(path: Path) -> KeyFact:
    """The file with the peer's key, which is not created."""
    problems: list[str] = []
    peer_ids: list[str] = []

    def read(data: bytes) -> None:
        try:
            peer_ids.append(str(peer_id_in(path, data)))
        except KeyFileError as error:
            problems.append(str(error).removeprefix(f"the key file {path} "))

    file = _look_at(path, read)
    if problems:
        file = FileFact(path=path, mode=file.mode, is_ours=file.is_ours, problem=problems[0])
    return KeyFact(
        file=file,
        peer_id="".join(peer_ids),
        in_use=file.exists and _is_locked(path),
        can_be_made=os.access(_existing(path.parent), os.W_OK | os.X_OK),
    )


def look_at_state(identity: Path) -> list[FileFact]:
    """The files that the peer keeps across restarts, and their folder."""
    folder = state_dir(identity)
    readers: dict[str, Callable[[bytes], object]] = {
        SEQ_FILE: _read_seq,
        CONTACTS_FILE: json.loads,
        CONVICTIONS_FILE: json.loads,
        CONTRIBUTIONS_FILE: json.loads,
    }
    return [_look_at(folder, None), *(_look_at(folder / name, read) for name, read in readers.items())]


def look_at_token(path: Path) -> FileFact:
    """The file with the token of the local API."""

    def read(data: bytes) -> None:
        if len(data.strip()) < _LEAST_TOKEN_CHARS:
            raise ValueError

    return _look_at(path, read)


def _look_at(path: Path, read: Callable[[bytes], object] | None) -> FileFact:
    """A file as it lies there. `read` raises ValueError for what it cannot use."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return FileFact(path=path, exists=False)
    except OSError as error:
        return FileFact(path=path, is_ours=False, problem=f"cannot be read: {error.strerror}")
    problem = _content_problem(path, read) if read is not None else ""
    return FileFact(
        path=path,
        mode=stat.S_IMODE(found.st_mode) & (0o777 if read is not None else 0o077),
        is_ours=found.st_uid == os.getuid(),
        problem=problem,
    )


def _content_problem(path: Path, read: Callable[[bytes], object]) -> str:
    try:
        if not path.is_file():
            return "is not a file"
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            return f"has more than {MAX_FILE_BYTES >> 20} MiB"
        read(data)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return "is damaged"
    return ""


def _read_seq(data: bytes) -> None:
    if not 0 <= int(data) < MAX_KEPT_SEQ:
        raise ValueError


def _is_locked(path: Path) -> bool:
    """Whether a daemon holds the file's lock. We take it for a moment, as a daemon that starts just then would see."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def look_at_folder(path: Path, holds: str) -> FolderFact:
    """The disk space where a folder is, or will be made."""
    there = _existing(path)
    try:
        free_bytes = os.statvfs(there).f_bavail * os.statvfs(there).f_frsize
    except OSError:
        free_bytes = 0
    return FolderFact(path, holds, free_bytes, os.access(there, os.W_OK | os.X_OK))


def _existing(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    return next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path("/"))


def look_at_limits() -> LimitsFact:
    """How many files a daemon may open: it raises its own limit as far as the hard one allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = WANTED_FILES if hard == resource.RLIM_INFINITY else hard
    return LimitsFact(hard, WANTED_FILES, connection_limits(min(hard, WANTED_FILES)).settled, MAX_CONNECTIONS)


def look_at_packages() -> list[PackageFact]:
    """The packages that peerd needs, as its own metadata say."""
    wanted = [Requirement(line) for line in requires("peerd") or ()]
    return [_package(one) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def _package(wanted: Requirement) -> PackageFact:
    try:
        installed = version(wanted.name)
    except PackageNotFoundError:
        return PackageFact(wanted.name, str(wanted.specifier), None, fits=False)
    fits = wanted.specifier.contains(installed, prereleases=True)
    return PackageFact(wanted.name, str(wanted.specifier), installed, fits)

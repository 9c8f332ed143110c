"""Downloads one file from the hub, and resumes if a part of it is already on disk.

Bytes that arrived are not fetched again, even after a broken connection or a killed process. A file is complete if it
has the hash that the hub lists; a file with another hash is deleted. A piece of a file has no such hash: what an
earlier run left of it cannot be checked, and is fetched again. A download runs in a thread of its own; `stop`
ends it at the next piece of data, or at the next timeout if none comes.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

from peerd.compute.checkpoint.hub.http import Fetchable, Hub, HubPiece, Listing, Stream, Transient
from peerd.compute.errors import CheckpointError, DiskFullError, HubUnavailableError

log = logging.getLogger(__name__)

_REREAD_BYTES = 1 << 20


class Stopped(Exception):
    """The caller asked this download to stop. The bytes that arrived stay on disk."""


class Download:
    """One file's download. `fd` is open for reading and writing, and only the download uses it; `done` counts its
    bytes.
    """

    def __init__(
        self, hub: Hub, listing: Listing, file: Fetchable, fd: int, stop: threading.Event, delays_s: Sequence[float]
    ) -> None:
        self.file = file
        self.done = 0
        self._hub = hub
        self._listing = listing
        self._fd = fd
        self._stop = stop
        self._delays_s = delays_s
        self._hash = _new_hash(file)

    def run(self) -> None:
        """Return when the file is complete. Raises Stopped, HubUnavailableError, DiskFullError or CheckpointError."""
        resumed = self._take_what_is_there()
        self._receive()
        if resumed and not self._is_right():
            # Another process wrote the first part, perhaps before a power cut.
            log.warning("%s: the partial file on disk is damaged; downloading the whole file", self.file.name)
            self._start_over()
            self._receive()
        if not self._is_right():
            self._start_over()
            raise CheckpointError(
                f"{self._listing.repo}: {self.file.name} as the hub sent it does not have the hash that the hub lists"
                f" ({self.file.blob}); it was deleted: try again, and if it stays so, report it to the publisher"
            )
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _take_what_is_there(self) -> bool:
        """Hash what an earlier run left. Returns whether there was anything."""
        there = os.fstat(self._fd).st_size
        if there > self.file.size or isinstance(self.file, HubPiece):
            self._start_over()
            return False
        while self.done < there:
            self._check()
            data = os.pread(self._fd, _REREAD_BYTES, self.done)
            self._hash.update(data)
            self.done += len(data)
        return there > 0

    def _receive(self) -> None:
        """Receive all missing bytes; a broken connection is opened again until the retries are used up."""
        failures = 0
        while self.done < self.file.size:
            self._check()
            before = self.done
            try:
                with self._hub.stream(self._listing, self.file, self.done) as stream:
                    self._write(stream)
            except Transient as error:
                failures = 0 if self.done > before else failures
                if failures == len(self._delays_s):
                    raise HubUnavailableError(
                        f"{self._listing.repo}: {self.file.name} cannot be fetched: {error};"
                        f" {self.done} of {self.file.size} bytes are kept: try again later"
                    ) from error
                delay_s = max(self._delays_s[failures], error.after_s)
                failures += 1
                log.info("%s: %s; going on at byte %d in %.1f s", self.file.name, error, self.done, delay_s)
                if self._stop.wait(delay_s):
                    raise Stopped from None

    def _write(self, stream: Stream) -> None:
        if stream.start != self.done:
            # The hub ignored the range and sends the file from its start.
            self._start_over()
        for chunk in stream.chunks:
            data = memoryview(chunk)[: self.file.size - self.done]
            try:
                _write_all(self._fd, data, self.done)
            except OSError as error:
                raise self._cannot_write(error) from error
            self._hash.update(data)
            self.done += len(data)
            if self.done == self.file.size:
                return
            self._check()
        if self.done < self.file.size:
            raise Transient(f"the transfer ended after {self.done} of {self.file.size} bytes")

    def _cannot_write(self, error: OSError) -> CheckpointError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFullError(
                f"{self._listing.repo}: the disk is full with {self.file.size - self.done} bytes of {self.file.name}"
                " still to come: free some, or set HF_HOME to another disk; what arrived is kept"
            )
        return CheckpointError(f"{self._listing.repo}: {self.file.name} cannot be written: {error.strerror}")

    def _is_right(self) -> bool:
        return isinstance(self.file, HubPiece) or bool(self._hash.hexdigest() == self.file.blob)

    def _start_over(self) -> None:
        os.ftruncate(self._fd, 0)
        self.done = 0
        self._hash = _new_hash(self.file)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _new_hash(file: Fetchable) -> Any:
    """The kind of hash that the hub lists: sha256 for LFS files, git's own for the others."""
    if isinstance(file, HubPiece) or file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _write_all(fd: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(fd, data, position)
        data, position = data[count:], position + count

"""Standard output, error and input as a command finds them: full, closed, a terminal that has gone, or not there.

A result that cannot be written ends the command with one line and an exit code of its own. What cannot be said on
standard error is lost, and ends nothing: a daemon outlives its terminal.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class OutputFailed(Exception):
    """Standard output takes nothing more. Not an OSError: others catch those of files and sockets."""

    def __init__(self, error: OSError) -> None:
        gone = error.errno in (errno.EPIPE, errno.EBADF)
        super().__init__(f"cannot write to standard output: {'it is closed' if gone else error.strerror or error}")


class _Waiting(io.FileIO):
    """A file that its other users may have made non-blocking, as Node does with pipes: we wait for it."""

    def write(self, data: ReadableBuffer, /) -> int:
        while True:
            written: int | None = super().write(data)
            if written is not None:
                return written
            select.select([], [self], [])


class _Output(_Waiting):
    _failed = False

    def write(self, data: ReadableBuffer, /) -> int:
        # It is said once. What is buffered above us would fail with every flush, up to the last.
        if self._failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            raise OutputFailed(error) from error


class _Messages(_Waiting):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def guard_standard_files() -> None:
    """Let writes to standard output raise OutputFailed, and those to standard error nothing. Once, at the start."""
    _occupy()
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout = _wrapped(_Output, 1, sys.stdout, "strict")
    sys.stderr = _wrapped(_Messages, 2, sys.stderr, "backslashreplace")


def flush_standard_files() -> None:
    """Write what is still buffered. Raises OutputFailed."""
    sys.stderr.flush()
    sys.stdout.flush()


def _occupy() -> None:
    """Have something at descriptors 0 to 2: a socket there would get what is meant for a terminal."""
    # In order, for a file gets the lowest free number. The second is open for reading only, so that writes fail.
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)


def _wrapped(kind: type[_Waiting], descriptor: int, before: Any, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(kind(descriptor, "w", closefd=False)),
        encoding=before.encoding if before is not None else "utf-8",
        errors=before.errors if before is not None else errors,
        line_buffering=os.isatty(descriptor) or descriptor == 2,
    )

"""What a process may have, set for a daemon before it starts: open files, and heaps of the C library."""

from __future__ import annotations

import ctypes
import logging
import os
import resource

from peerd.net.limits.gate import MAX_CONNECTIONS, connection_limits, descriptor_limit

log = logging.getLogger(__name__)

# Enough for all connections, and a local API with thousands of requests. Some systems allow a billion, for which other
# programs would reserve tables.
WANTED_FILES = 8192
# glibc's number of the parameter that MALLOC_ARENA_MAX sets (malloc.h).
_M_ARENA_MAX = -8
# One for the event loop and one for the threads that compute beside it.
MAX_HEAPS = 2


def raise_descriptor_limit() -> None:
    """Raise the limit of open files as far as the system allows, and warn if it limits our connections.

    Children inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            log.warning("cannot raise the limit of open files from %d to %d: %s", soft, wanted, error)
    limit = descriptor_limit()
    if (settled := connection_limits(limit).settled) < MAX_CONNECTIONS:
        log.warning(
            "this process may have %d files open, so at most %d peers can be connected: raise the hard limit"
            " (ulimit -Hn, or LimitNOFILE= in systemd)",
            limit,
            settled,
        )


def share_heaps() -> None:
    """Have all threads use MAX_HEAPS heaps, if the C library is glibc and MALLOC_ARENA_MAX is not set.

    glibc gives each thread a heap of its own, up to eight for each core, and what is freed in one is not reused in
    another. Jobs go to whichever worker thread is free, so each heap grew to what the largest job needs: with 16 chats,
    a client took 260 MiB more after a minute, and nothing more with one heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, MAX_HEAPS)

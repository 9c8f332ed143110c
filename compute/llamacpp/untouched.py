"""Gives the memory of a cache back to the system that llama.cpp has only written zeros over.

llama.cpp clears its whole KV cache when it makes it, and so takes the memory of every position, used or not. On Linux
a process may say that it does not need what pages of its own hold: they read as zeros from then on, and take memory
again when they are written. Elsewhere the memory stays taken.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

#: Whether this system takes pages back.
TAKES_BACK = sys.platform == "linux"


def give_back_zeros(ranges: Iterable[tuple[int, int]]) -> int:
    """Give back the whole pages in these ranges of addresses, (first, end), and return how many bytes that are.

    The caller says that what is there need not be kept: it reads as zeros afterwards. Only memory that belongs to this
    process alone, and to no file, is given back.
    """
    if not TAKES_BACK:
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    own, given = list(_own_memory()), 0
    for first, end in ranges:
        start, stop = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if start >= stop or not any(low <= start and stop <= high for low, high in own):
            continue
        if madvise(start, stop - start, mmap.MADV_DONTNEED):
            log.info("the system keeps the memory of an empty cache: error %d", ctypes.get_errno())
            break
        given += stop - start
    return given


def _own_memory() -> Iterator[tuple[int, int]]:
    """The ranges of addresses that are private to this process, writable, and of no file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, flags, _, _, inode, *_ = line.split()
        if flags.startswith("rw") and flags.endswith("p") and inode == "0":
            low, high = addresses.split("-")
            yield int(low, 16), int(high, 16)

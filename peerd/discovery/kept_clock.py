"""Asks the system whether it keeps its clock right."""

from __future__ import annotations

import ctypes

# `struct timex` has 208 bytes where longs have 8; a larger buffer is harmless.
_TIMEX_BYTES = 512
# adjtimex(2) returns this if no program keeps the clock right.
_TIME_ERROR = 5


def is_clock_kept() -> bool:
    """Whether the kernel says that its clock is synchronised. False also if the kernel does not say."""
    adjtimex = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    if adjtimex is None:
        return False
    # An empty request, which changes nothing.
    state: int = adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return 0 <= state < _TIME_ERROR

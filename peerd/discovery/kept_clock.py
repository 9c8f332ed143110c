"""Whether the system keeps its clock right, as far as it says so."""

from __future__ import annotations

import ctypes

# `struct timex` has 208 bytes where longs have 8; more is harmless.
_TIMEX_BYTES = 512
# What adjtimex(2) returns where nobody keeps the clock.
_TIME_ERROR = 5


def is_clock_kept() -> bool:
    """Whether the kernel says that its clock is synchronised. False also where it does not say."""
    adjtimex = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    if adjtimex is None:
        return False
    # All zero: change nothing.
    state: int = adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return 0 <= state < _TIME_ERROR

"""Giving freed memory back to the machine.

The C library keeps what is freed for later, in pieces of up to 32 MiB: after blocks were read, that is what their
sources took. Nobody else can use it then, and it counts as ours.
"""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Return what the C library holds and does not use. Takes a millisecond or so; does nothing where it cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

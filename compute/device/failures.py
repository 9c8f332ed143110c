"""Decides what kind of failure a device's error is. torch has exception classes for only a few, so its messages are
searched.
"""

from __future__ import annotations

import torch

# Parts of messages: torch's if the host has no memory, and those of CUDA's libraries if the device has none.
_FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device has no memory left. A smaller piece of work, or a later one, may succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def is_device_lost(error: BaseException) -> bool:
    """Whether the device cannot compute for this process any more, for example after a failed assert in a kernel."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)

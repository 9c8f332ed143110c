"""Tells what kind of failure a device's error is: torch has words for some, and classes for few."""

from __future__ import annotations

import torch

# torch's words for a host without memory, and those of CUDA's libraries for a device without.
_FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device has no memory left: what is smaller, or comes later, may fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def is_device_lost(error: BaseException) -> bool:
    """Whether the device computes nothing more for this process, as after an assert of one of its kernels."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)

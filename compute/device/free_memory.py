"""Measures how much memory this process can still take. A container's limit counts like the machine's."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from peerd.compute.device.host_memory import free_host_memory


def free_memory(device: str | torch.device = "cpu", *, root: Path = Path("/")) -> int:
    """How many bytes can still be allocated on a device. Linux only.

    For the CPU it is what `free_host_memory` says. `root` is the folder that holds `proc` and `sys`.
    """
    device = torch.device(device)
    if device.type != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return free_host_memory(root)


def give_back_memory(device: str | torch.device) -> None:
    """Give memory of a device that this process holds and does not use back to it. Takes a fraction of a second."""
    # Models and errors contain reference cycles.
    gc.collect()
    if torch.device(device).type == "cuda":
        # Memory that torch keeps for its next tensors would count as taken.
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return to the system the memory that the C library holds unused. Takes about a millisecond; needs glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

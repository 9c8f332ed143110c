"""Measures how much memory this process can still take; a container's limit counts like the machine's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


def free_memory(device: str | torch.device = "cpu", *, root: Path = Path("/")) -> int:
    """How many bytes can still be allocated on a device. Linux only.

    For the CPU it is the least that the machine and every control group around this process leave. `root` is the folder
    that holds `proc` and `sys`.
    """
    device = torch.device(device)
    if device.type != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    limits = [_available(root / "proc/meminfo"), *_left_by_groups(root)]
    return max(0, min(limits))


def _available(meminfo: Path) -> int:
    """The kernel's own estimate of the memory that can be taken without swapping."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.removesuffix("kB")) * 1024
    raise OSError(f"{meminfo} does not say MemAvailable")


def _left_by_groups(root: Path) -> list[int]:
    """What each control group (version 2) around this process leaves; groups without a limit are left out."""
    try:
        own = (root / "proc/self/cgroup").read_text()
    except FileNotFoundError:
        return []
    path = next((line[3:] for line in own.splitlines() if line.startswith("0::")), "/")
    mount = root / "sys/fs/cgroup"
    group = mount / path.strip().lstrip("/")
    left = [_left_by(folder) for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return [bytes_left for bytes_left in left if bytes_left is not None]


def _left_by(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        # The file cache counts as used memory, but the kernel gives it back on demand.
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except FileNotFoundError:
        return None


def trim_heap() -> None:
    """Return to the system the memory that the C library holds unused. Takes about a millisecond; needs glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

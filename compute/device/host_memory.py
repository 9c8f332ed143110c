"""Measures how much of the machine's memory this process can still take, without torch, which may be missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


def free_host_memory(root: Path = Path("/")) -> int:
    """The least that the machine and every control group around this process leave, in bytes. Linux only.

    `root` is the folder that holds `proc` and `sys`.
    """
    limits = [_available(root / "proc/meminfo"), *_left_by_groups(root)]
    return max(0, min(limits))


def _available(meminfo: Path) -> int:
    """The kernel's own estimate of the memory that can be taken without swapping."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.removesuffix("kB")) * 1024
    raise OSError(f"{meminfo} does not say MemAvailable")


@dataclass(frozen=True, slots=True)
class _Files:
    """The files in which a version of control groups gives a group's limit, its use, and the part of that which is file
    cache.
    """

    mount: str
    limits: tuple[str, ...]
    used: str
    reclaimable: str


# Beyond memory.high the kernel slows the group down until nothing moves.
_VERSION_2 = _Files("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file")
# Version 1 writes a huge number if there is no limit.
_VERSION_1 = _Files("sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def _left_by_groups(root: Path) -> list[int]:
    """What each control group around this process leaves, for both versions. Groups without a limit are left out."""
    try:
        own = (root / "proc/self/cgroup").read_text()
    except OSError:
        return []
    left: list[int] = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            left += _left_along(root, _VERSION_2, path)
        elif "memory" in controllers.split(","):
            left += _left_along(root, _VERSION_1, path)
    return left


def _left_along(root: Path, files: _Files, path: str) -> list[int]:
    """What a group and the groups around it leave. In a container the path may be the host's. Then only the mount
    exists, which is the container's own group.
    """
    mount = root / files.mount
    group = mount / path.strip().lstrip("/")
    left = [_left_by(folder, files) for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return [bytes_left for bytes_left in left if bytes_left is not None]


def _left_by(group: Path, files: _Files) -> int | None:
    limits = [limit for name in files.limits if (limit := _number(group / name)) is not None]
    used = _number(group / files.used)
    if not limits or used is None:
        return None
    # The file cache counts as used memory, but the kernel gives it back on demand.
    return min(limits) - used + _reclaimable(group / "memory.stat", files.reclaimable)


def _number(path: Path) -> int | None:
    """The number in a file; None if the file is missing or contains "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(statistics: Path, name: str) -> int:
    try:
        lines = statistics.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)

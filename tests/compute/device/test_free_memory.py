"""The memory that this process may still take, on fake machines: with control groups of both versions, and in
containers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from peerd.compute.device.free_memory import free_memory

AVAILABLE = 3_000_000 * 1024
MIB = 2**20
# The limit that version 1 shows for a group without a limit.
UNLIMITED = 9223372036854771712


class Machine:
    """A machine's /proc and /sys. `own` is /proc/self/cgroup; None for a kernel without control groups."""

    def __init__(self, root: Path, own: str | None) -> None:
        self.root = root
        self.write("proc/meminfo", "MemTotal: 4000000 kB\nMemFree: 1000 kB\nMemAvailable: 3000000 kB\n")
        if own is not None:
            self.write("proc/self/cgroup", own)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def group(self, path: str, limit: int | str, used: int, cache: int = 0, *, high: int | str = "max") -> Machine:
        folder = f"sys/fs/cgroup/{path}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"anon 5\ninactive_file {cache}\nactive_file 7\n")
        return self

    def old_group(self, path: str, limit: int, used: int, cache: int = 0) -> Machine:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"cache 9\ninactive_file 1\ntotal_inactive_file {cache}\n")
        return self

    def free(self) -> int:
        return free_memory(root=self.root)


OLD = "12:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n1:name=systemd:/docker/abc\n"


def test_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    assert Machine(tmp_path, None).free() == AVAILABLE


def test_the_tightest_group_decides_and_gives_back_its_file_cache(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/box/inner\n").group("box", 1_000_000, 900_000, 50_000)
    assert machine.group("box/inner", "max", 800_000).free() == 150_000


def test_a_group_that_is_slowed_down_counts_as_one_that_is_killed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/system.slice/peerd.service\n")
    assert machine.group("system.slice/peerd.service", 1_000_000, 500, high=700).free() == 200


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert Machine(tmp_path, "0::/box\n").group("box", 1000, 5000).free() == 0


def test_a_container_with_its_own_view_of_groups_sees_its_limit_at_the_mount(tmp_path: Path) -> None:
    assert Machine(tmp_path, "0::/\n").group("", 600 * MIB, 100 * MIB, 20 * MIB).free() == 520 * MIB


def test_a_container_of_version_1_is_told_the_host_s_path_and_sees_its_own_group(tmp_path: Path) -> None:
    assert Machine(tmp_path, OLD).old_group("", 600 * MIB, 100 * MIB, 20 * MIB).free() == 520 * MIB


def test_groups_of_version_1_around_this_process_count_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path, OLD).old_group("docker", 2000, 1500).old_group("docker/abc", UNLIMITED, 100)
    assert machine.old_group("", UNLIMITED, 10**9).free() == 500


def test_with_both_versions_the_one_that_limits_memory_decides(tmp_path: Path) -> None:
    machine = Machine(tmp_path, f"{OLD}0::/system.slice/docker.service\n")
    assert machine.old_group("docker/abc", 600 * MIB, 100 * MIB).free() == 500 * MIB


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    assert Machine(tmp_path, OLD).old_group("docker/abc", UNLIMITED, 100 * MIB).free() == AVAILABLE


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
def test_a_group_whose_files_cannot_be_read_limits_nothing_more(tmp_path: Path, name: str) -> None:
    machine = Machine(tmp_path, "0::/box\n").group("box", 1_000_000, 900_000, 50_000)
    (tmp_path / "sys/fs/cgroup/box" / name).unlink()
    assert machine.free() == (100_000 if name == "memory.stat" else AVAILABLE)


def test_this_machine_has_some_memory_left() -> None:
    assert free_memory() > 0

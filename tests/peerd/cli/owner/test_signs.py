"""The signs of use, from files and answers of programs as a machine has them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peerd.cli.owner.signs import Watch, desktop_idle_s, gpu_share_of_others, gpus_of, own_names

TICKS = os.sysconf("SC_CLK_TCK")
PMON = """\
# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command
# Idx           #    C/G      %      %      %      %      %      %    name
    0       1234     C     70      5      -      -      -      -    python
    0       2345     G     20      1      -      -      -      -    game
    0       2346     G      5      1      -      -      -      -    desktop
    1       2347     C      -      -      -      -      -      -    idle
    2       9999     C     99      9      -      -      -      -    elsewhere
"""


class Machine:
    """A machine of two cores whose figures a test sets, in seconds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.user = self.nice = self.system = self.now = 0.0
        self.own = (0.0, 0.0)
        self.answers: dict[str, str] = {}
        (root / "proc").mkdir()
        self.write()

    def write(self) -> None:
        words = [int(value * TICKS) for value in (self.user, self.nice, self.system, 1e6, 0, 0, 0, 0)]
        (self.root / "proc/stat").write_text(f"cpu  {' '.join(map(str, words))}\ncpu0 1 2 3\n")

    def watch(self, gpus: tuple[int, ...] = ()) -> Watch:
        return Watch(
            gpus,
            root=self.root,
            cores=2,
            ask=lambda command: self.answers.get(command[0], ""),
            wall_clock=lambda: 1000.0,
            clock=lambda: self.now,
            own_times=lambda: os.times_result((*self.own, 0.0, 0.0, self.now)),
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def set_nice(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda nice: monkeypatch.setattr(os, "getpriority", lambda *_: nice)


def test_what_others_compute_counts_by_cores(machine: Machine, set_nice: Callable[[int], None]) -> None:
    set_nice(0)
    watch = machine.watch()
    machine.now, machine.user, machine.own = 10.0, 15.0, (5.0, 0.0)
    machine.write()
    assert watch.look().cores == pytest.approx(0.5)


def test_our_niced_time_is_counted_apart_and_is_not_subtracted_twice(
    machine: Machine, set_nice: Callable[[int], None]
) -> None:
    set_nice(10)
    watch = machine.watch()
    machine.now, machine.nice, machine.user, machine.system, machine.own = 10.0, 18.0, 2.0, 1.0, (18.0, 1.0)
    machine.write()
    assert watch.look().cores == pytest.approx(0.1)


def test_another_niced_peer_is_not_taken_for_the_owner(machine: Machine, set_nice: Callable[[int], None]) -> None:
    set_nice(10)
    watch = machine.watch()
    machine.now, machine.nice = 10.0, 20.0
    machine.write()
    assert watch.look().cores == 0.0


def test_each_look_takes_the_time_since_the_last(machine: Machine, set_nice: Callable[[int], None]) -> None:
    set_nice(0)
    watch = machine.watch()
    for now, user, share in ((10.0, 20.0, 1.0), (20.0, 20.0, 0.0), (30.0, 25.0, 0.25)):
        machine.now, machine.user = now, user
        machine.write()
        assert watch.look().cores == pytest.approx(share)


def test_a_machine_without_these_figures_says_nothing(tmp_path: Path) -> None:
    watch = Watch(root=tmp_path, ask=lambda _command: "")
    signs = watch.look()
    assert (signs.cores, signs.gpu, signs.input_idle_s) == (None, None, None)


def test_the_last_input_at_any_terminal_counts(machine: Machine) -> None:
    folder = machine.root / "dev/pts"
    folder.mkdir(parents=True)
    for name, at in (("0", 400.0), ("7", 990.0), ("ptmx", 1000.0)):
        (folder / name).touch()
        os.utime(folder / name, (at, 0.0))
    assert machine.watch().look().input_idle_s == pytest.approx(10.0)


def test_a_desktop_s_idle_time_counts_if_it_is_the_shortest(machine: Machine) -> None:
    machine.answers["loginctl"] = "ActiveSession=c1\nIdleHint=yes\nIdleSinceHint=700000000\n"
    assert machine.watch().look().input_idle_s == pytest.approx(300.0)


@pytest.mark.parametrize(
    ("text", "idle"),
    [
        ("ActiveSession=c1\nIdleHint=no\nIdleSinceHint=0\n", 0.0),
        ("ActiveSession=c1\nIdleHint=yes\nIdleSinceHint=0\n", None),
        ("ActiveSession=\nIdleHint=no\n", None),
        ("", None),
        ("Failed to connect to bus", None),
    ],
)
def test_what_a_desktop_says(text: str, idle: float | None) -> None:
    assert desktop_idle_s(text, 1000.0) == idle


NAMES = frozenset({"python", "python3.11", "peerd"})


def test_the_gpu_that_others_use_most_counts_without_our_own_share() -> None:
    assert gpu_share_of_others(PMON, (0, 1), 1234, NAMES) == pytest.approx(0.25)
    assert gpu_share_of_others(PMON, (1,), 1234, NAMES) == 0.0
    assert gpu_share_of_others("no devices were found", (0,), 1, NAMES) == 0.0


@pytest.mark.parametrize(
    ("processes", "others"),
    [
        (["1234 C 90 5 - - - - python3.11"], 0.0),
        (["1234 C 90 5 - - - - -"], 0.0),
        (["1234 C 90 5 - - - - python3", "2345 G 20 1 - - - - game"], 0.2),
        (["1234 C 90 5 - - - - -", "2345 G 20 1 - - - - -"], 0.2),
        # Two that may be ours: what surely others use is the share of the lesser.
        (["1234 C 90 5 - - - - python", "2345 C 30 1 - - - - python"], 0.3),
        # Another's process has by chance the number that we have in our namespace.
        (["7 G 60 1 - - - - game", "1234 C 30 5 - - - - peerd"], 0.6),
        ([], 0.0),
    ],
)
def test_in_a_container_our_own_use_is_never_taken_for_the_owner_s(processes: list[str], others: float) -> None:
    text = "\n".join(f"    0 {line}" for line in processes)
    assert gpu_share_of_others(text, (0,), 7, NAMES) == pytest.approx(others)


def test_our_own_names_are_the_interpreter_s_and_the_command_s() -> None:
    assert Path(sys.executable).name in own_names()


def test_gpus_are_asked_only_where_blocks_run_on_them(machine: Machine) -> None:
    machine.answers["nvidia-smi"] = PMON
    assert machine.watch().look().gpu is None
    assert machine.watch((2,)).look().gpu == pytest.approx(0.99)


def test_torch_s_numbers_become_the_driver_s() -> None:
    assert gpus_of(["cpu", "cuda:0", "cuda:1"], "") == [0, 1]
    assert gpus_of(["cuda:0", "cuda:1"], "3,1") == [3, 1]
    assert gpus_of(["cuda:0"], "GPU-8932f937") == [0]


def test_an_answer_that_is_no_text_is_read_as_far_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "loginctl"
    program.write_text("#!/bin/sh\nprintf 'Name=\\303\\nActiveSession=c1\\nIdleHint=no\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Watch(root=tmp_path).look().input_idle_s == 0.0

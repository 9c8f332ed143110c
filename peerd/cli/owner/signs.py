"""Reads the signs of use: processor times, GPU times and users' input. What a machine does not say is None.

Each look takes what the system has counted since the last one. Our own share is subtracted. Niced programs do not
count: they are meant to wait, and two peers on one machine must not take each other for its owner.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peerd.cli.owner.decision import Signs

# Programs that ask a driver may hang with it.
_ASK_S = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")
# In the order of /proc/stat (proc(5)).
_USER, _SYSTEM, _IRQ, _SOFTIRQ = 0, 2, 5, 6


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of processor time: of programs that are not niced, and our own; and when."""

    used: float
    own: float
    at: float


class Watch:
    """Looks at this machine. Use it in a worker thread: it reads files and runs programs.

    gpus: the numbers of the GPUs that we compute on. root: where /proc and /dev are, for tests.
    """

    def __init__(
        self,
        gpus: Iterable[int] = (),
        *,
        root: Path = Path("/"),
        cores: int | None = None,
        ask: Callable[[list[str]], str] | None = None,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        own_times: Callable[[], os.times_result] = os.times,
    ) -> None:
        self._gpus = tuple(gpus)
        self._root = root
        self._cores = cores or os.cpu_count() or 1
        self._ask = ask or _answer_of
        self._wall_clock = wall_clock
        self._clock = clock
        self._own_times = own_times
        self._last = self._times()

    def look(self) -> Signs:
        """The signs since the last look."""
        return Signs(cores=self._cores_used(), gpu=self._gpu_used(), input_idle_s=self._input_idle_s())

    def _cores_used(self) -> float | None:
        last, self._last = self._last, self._times()
        if last is None or self._last is None or self._last.at <= last.at:
            return None
        seconds = (self._last.used - last.used) - (self._last.own - last.own)
        return max(0.0, seconds / (self._last.at - last.at) / self._cores)

    def _times(self) -> _Times | None:
        try:
            first = (self._root / "proc/stat").read_text().partition("\n")[0]
            ticks = [int(word) for word in first.split()[1:]]
            used = sum(ticks[index] for index in (_USER, _SYSTEM, _IRQ, _SOFTIRQ)) / _TICKS
        except (OSError, ValueError, IndexError):
            return None
        own = self._own_times()
        # The system counts a niced program's time apart, but not that of the kernel for it.
        mine = own.system + own.children_system
        if os.getpriority(os.PRIO_PROCESS, 0) <= 0:
            mine += own.user + own.children_user
        return _Times(used, mine, self._clock())

    def _gpu_used(self) -> float | None:
        if not self._gpus or not (text := self._ask(["nvidia-smi", "pmon", "-c", "1", "-s", "u"])):
            return None
        return gpu_share_of_others(text, self._gpus, os.getpid(), own_names())

    def _input_idle_s(self) -> float | None:
        """Seconds since input at a terminal, here or through ssh, or at a desktop that tells the system."""
        found = [self._wall_clock() - at for at in self._terminals()]
        desktop = self._ask(["loginctl", "show-seat", "seat0"])
        if (idle := desktop_idle_s(desktop, self._wall_clock())) is not None:
            found.append(idle)
        return max(0.0, min(found)) if found else None

    def _terminals(self) -> Iterable[float]:
        """When each terminal was last read from, which is when its user typed."""
        for pattern in ("dev/pts/[0-9]*", "dev/tty[0-9]*"):
            for path in self._root.glob(pattern):
                try:
                    found = path.stat()
                except OSError:
                    continue
                # Of consoles where nobody is logged in the system owns all; their times change when it writes there.
                if found.st_uid or "pts" in path.parts:
                    yield found.st_atime


def gpus_of(devices: Iterable[str], visible: str) -> list[int]:
    """The driver's numbers of torch's devices, where `visible` is CUDA_VISIBLE_DEVICES."""
    numbers = [int(name.partition(":")[2]) for name in devices if name.startswith("cuda:")]
    shown = [int(word) for word in visible.split(",") if word.strip().isdigit()]
    return [shown[number] if number < len(shown) else number for number in numbers]


def gpu_share_of_others(text: str, gpus: Iterable[int], own: int, names: Collection[str]) -> float:
    """Of `nvidia-smi pmon`, the greatest share of one of the GPUs that other processes use, 0 to 1.

    own, names: our process's number, and what it may be called. In a container the driver counts processes of another
    namespace: our number is not listed, or is another process's. There, of each GPU's processes that may be ours by
    their names, the busiest counts as ours, so that we never take ourselves for the owner.
    """
    found: dict[int, list[_OnGpu]] = {gpu: [] for gpu in gpus}
    for gpu, process in _processes_on_gpus(text):
        if gpu in found:
            found[gpu].append(process)
    return max((_share_of_others(processes, own, names) for processes in found.values()), default=0.0)


@dataclass(frozen=True, slots=True)
class _OnGpu:
    """A process that uses a GPU; `share` of its time, 0 to 1."""

    number: int
    share: float
    name: str

    def may_be(self, names: Collection[str]) -> bool:
        # The driver cuts long names, and cannot read those of processes of another namespace.
        return self.name == "-" or any(name.startswith(self.name) for name in names)


def _processes_on_gpus(text: str) -> Iterator[tuple[int, _OnGpu]]:
    for line in text.splitlines():
        words = line.split()
        if len(words) > 4 and words[0].isdigit() and words[1].isdigit():
            share = int(words[3]) / 100 if words[3].isdigit() else 0.0
            yield int(words[0]), _OnGpu(int(words[1]), share, words[-1])


def _share_of_others(processes: Sequence[_OnGpu], own: int, names: Collection[str]) -> float:
    ours = [one for one in processes if one.may_be(names)]
    known = [one for one in ours if one.number == own]
    return sum(one.share for one in processes) - max((one.share for one in known or ours), default=0.0)


def own_names() -> frozenset[str]:
    """What a driver may call this process: by its interpreter, or by its command."""
    return frozenset(Path(name).name for name in (sys.executable, os.path.realpath(sys.executable), sys.argv[0]))


def desktop_idle_s(text: str, now: float) -> float | None:
    """Of `loginctl show-seat`, since when the desktop's user is idle; None if nobody uses one, or it does not say."""
    properties = dict(line.partition("=")[::2] for line in text.splitlines())
    if not properties.get("ActiveSession"):
        return None
    if properties.get("IdleHint") == "no":
        return 0.0
    since = properties.get("IdleSinceHint", "")
    return now - int(since) / 1e6 if since.isdigit() and int(since) else None


def _answer_of(command: list[str]) -> str:
    """What a program prints; "" if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        # The names of other processes may hold any bytes.
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_ASK_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""

"""Runs the trials of `trials.py`, each as a process of its own that may crash or hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence

import trio

from peerd.cli.doctor.facts import TrialFact

# Importing torch takes some seconds, on a busy machine with a slow disk many more.
DEADLINE_S = 50.0
# The device alone: without the other packages a peer serves.
NEEDED = "device"
_MAX_PROBLEM_CHARS = 300
_FIX_CRASH = "install the package {name} and torch again; the command shows the crash: {command}"


async def run_trial(name: str, program: Sequence[str] | None = None) -> TrialFact:
    """Run one trial. `program`: the command, for tests. Ends its process whatever happens."""
    # -P: a file of the user's called torch.py, where the user stands, is not torch.
    command = list(program or (sys.executable, "-P", "-m", "peerd.cli.doctor.trials", name))
    is_needed = name == NEEDED
    fix = _FIX_CRASH.format(name="torch" if is_needed else name, command=" ".join(command))
    with trio.move_on_after(DEADLINE_S):
        try:
            done = await trio.run_process(
                command,
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                deliver_cancel=_kill,
            )
        except OSError as error:
            return TrialFact(name, problem=f"cannot be tried: {error.strerror}", fix=fix, is_needed=is_needed)
        return _read(name, done, fix)
    return TrialFact(name, problem=f"its trial hung for {DEADLINE_S:g} s", fix=fix, is_needed=is_needed)


async def _kill(process: trio.Process) -> None:
    # It has nothing to clean up, and may hang in a driver that hears no SIGTERM.
    process.kill()


def _read(name: str, done: subprocess.CompletedProcess[bytes], fix: str) -> TrialFact:
    is_needed = name == NEEDED
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        result = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except ValueError:
        result = None
    if not isinstance(result, dict):
        return TrialFact(name, problem=f"its trial {_ending(done)}", fix=fix, is_needed=is_needed)
    problem = " ".join(str(result.get("problem", "")).split())[:_MAX_PROBLEM_CHARS]
    return TrialFact(name, str(result.get("said", "")), problem, str(result.get("fix", "")), is_needed)


def _ending(done: subprocess.CompletedProcess[bytes]) -> str:
    """How a process ended that wrote no result: the signal, or its last words."""
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name})"
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return f"ended with {done.returncode}" + (f": {last[0][:_MAX_PROBLEM_CHARS]}" if last else "")

"""A loop that hangs ends its process, which logs where it hung."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from peerd.watchdog import EXIT_HUNG, HANG_TICKS, Pulse, tell_systemd, watching_the_loop

HANGS = """
import trio
from peerd.watchdog import watching_the_loop

def the_culprit():
    while True:
        pass

async def main():
    async with watching_the_loop(hang_ticks=3, tick_s=0.05):
        await trio.sleep(0.1)
        the_culprit()

trio.run(main)
"""


def test_only_ticks_without_a_beat_count() -> None:
    pulse = Pulse()
    for _ in range(100):
        assert not pulse.tick()
        pulse.beat()
    assert [pulse.tick() for _ in range(HANG_TICKS + 1)] == [False] * HANG_TICKS + [True]


@pytest.mark.processes
def test_a_loop_that_spins_ends_its_process_and_shows_the_stack() -> None:
    ran = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert ran.returncode == EXIT_HUNG
    assert "has not turned for 0.15 s" in ran.stderr
    assert "in the_culprit" in ran.stderr


async def test_systemd_hears_that_the_loop_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        tell_systemd("READY=1")
        async with watching_the_loop(tick_s=10):
            await trio.sleep(25)
        assert [systemd.recv(100) for _ in range(4)] == [b"READY=1", *[b"WATCHDOG=1"] * 3]
        with pytest.raises(BlockingIOError):
            systemd.recv(100)


@pytest.mark.parametrize("path", ["", "/nowhere/notify", "@peerd-test-nobody", "vsock:2:1"])
def test_a_systemd_that_is_not_there_is_no_failure(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    descriptors = len(os.listdir("/proc/self/fd"))
    tell_systemd("READY=1")
    assert len(os.listdir("/proc/self/fd")) == descriptors

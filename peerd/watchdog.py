"""Ends a daemon whose event loop hangs, and tells systemd that it does not.

A loop that spins or waits in a blocking call serves nobody, ignores SIGTERM and keeps its peers waiting; a process that
ends is started again by its supervisor, and its peers look for another at once. Only a thread can see it. It counts
its own ticks, not seconds: a process that was stopped, or slept with its machine, has not hung.

A hang inside a call that never lets go of the interpreter is seen by systemd alone, which hears nothing from us then.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from peerd.trio_tools import open_tasks

# A loop that has not turned for so many ticks hangs. No peer waits half as long for a sign of life.
HANG_TICKS: Final = 30
TICK_S: Final = 1.0
# EX_SOFTWARE of sysexits.h.
EXIT_HUNG: Final = 70


class Pulse:
    """Counts ticks between two beats. `beat` is the loop's, `tick` the thread's."""

    def __init__(self, hang_ticks: int = HANG_TICKS) -> None:
        self._hang_ticks = hang_ticks
        self._missed = 0

    def beat(self) -> None:
        """The loop has turned."""
        self._missed = 0

    def tick(self) -> bool:
        """A tick has passed. Whether the loop hangs."""
        self._missed += 1
        return self._missed > self._hang_ticks


@asynccontextmanager
async def watching_the_loop(*, hang_ticks: int = HANG_TICKS, tick_s: float = TICK_S) -> AsyncIterator[None]:
    """While in the block, write all threads' stacks to standard error and exit with 70 if the loop stands still."""
    pulse, ended = Pulse(hang_ticks), threading.Event()

    def watch() -> None:
        while not ended.wait(tick_s):
            if pulse.tick():
                _end(hang_ticks * tick_s)

    async with open_tasks() as tasks:
        tasks.start_soon(_beat, pulse, tick_s)
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            ended.set()


async def _beat(pulse: Pulse, tick_s: float) -> None:
    while True:
        pulse.beat()
        tell_systemd("WATCHDOG=1")
        await trio.sleep(tick_s)


def _end(hung_s: float) -> None:
    # No logging: its locks may be held by what hangs.
    with suppress(OSError):
        os.write(2, f"peerd: the event loop has not turned for {hung_s:g} s. Please report these stacks:\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
    os._exit(EXIT_HUNG)


def tell_systemd(line: str) -> None:
    """Send a line such as READY=1 to the systemd that started us with Type=notify. Never raises."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path.startswith(("/", "@")):
        # A name that begins with @ is in the kernel's own namespace.
        address = f"\0{path[1:]}" if path.startswith("@") else path
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messages:
            messages.setblocking(False)
            messages.sendto(line.encode(), address)

"""Ends a daemon whose event loop hangs, and tells systemd while it does not.

A loop that spins or waits in a blocking call answers no request, ignores SIGTERM and keeps its peers waiting. If the
process ends instead, its supervisor starts it again, and its peers use another at once. Only a thread can notice a
hang. The thread counts its own ticks, not seconds, because a process that was stopped, or that slept with its machine,
has not hung.

If a call hangs without releasing the interpreter, the thread cannot run either. Then systemd notices, because it hears
nothing from us.
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

# A loop that has not turned for this many ticks hangs. Other peers wait less than half as long for a sign of life.
HANG_TICKS: Final = 30
TICK_S: Final = 1.0
# EX_SOFTWARE of sysexits.h.
EXIT_HUNG: Final = 70


class Pulse:
    """Counts ticks between two beats. The loop calls `beat`, the thread calls `tick`."""

    def __init__(self, hang_ticks: int = HANG_TICKS) -> None:
        self._hang_ticks = hang_ticks
        self._missed = 0

    def beat(self) -> None:
        """Note that the loop has turned."""
        self._missed = 0

    def tick(self) -> bool:
        """Note that a tick has passed. Returns whether the loop hangs."""
        self._missed += 1
        return self._missed > self._hang_ticks


@asynccontextmanager
async def watching_the_loop(*, hang_ticks: int = HANG_TICKS, tick_s: float = TICK_S) -> AsyncIterator[None]:
    """Inside this context, if the loop stands still, write the stacks of all threads to standard error and exit with
    70.
    """
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
    # This does not use logging, whose locks may be held by the code that hangs.
    with suppress(OSError):
        os.write(2, f"peerd: the event loop has not turned for {hung_s:g} s. Please report these stacks:\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
    os._exit(EXIT_HUNG)


def tell_systemd(line: str) -> None:
    """Send a line such as READY=1 to systemd, if it started us with Type=notify. Never raises."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path.startswith(("/", "@")):
        # A name that begins with @ is in the kernel's own namespace.
        address = f"\0{path[1:]}" if path.startswith("@") else path
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messages:
            messages.setblocking(False)
            messages.sendto(line.encode(), address)

"""Notices that the machine slept, for callers whose connections and announcements did not survive it.

A suspended Linux machine stops the clock on which all our timers run: they are not even late, and only the wall clock
has moved on. On other systems, and for a process that was stopped, timers are late. Both show as time, on one of the
clocks, that a short wait should not have taken.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

# How often we look, and so the longest time after waking until we know.
LOOK_S = 1.0
# More than the time for which a busy machine delays a loop (protocol/connection/liveness.py), and less than the time
# after which connections and records are lost. Setting the wall clock looks like a sleep too, and makes us ask and
# announce once more than needed.
SLEPT_S = 5.0


async def watch_sleep(wall: Callable[[], float], on_waking: Callable[[float], Awaitable[None]]) -> None:
    """Call `on_waking` with the seconds slept after each sleep, until cancelled. `wall` returns unix seconds,
    uncorrected.
    """
    while True:
        started, wall_started = trio.current_time(), wall()
        await trio.sleep(LOOK_S)
        passed_s = max(trio.current_time() - started, wall() - wall_started)
        if passed_s >= LOOK_S + SLEPT_S:
            await on_waking(passed_s - LOOK_S)

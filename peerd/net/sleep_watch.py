"""Notices that the machine slept, for whoever holds connections and announcements that did not outlive it.

Knows two clocks and their difference; what is to be done about a sleep is its caller's business. The difficulty
is that a suspended Linux machine stops the clock that all our timers run on: they are not even late, and only the
clock on the wall has moved on. Elsewhere, and for a process that was stopped, timers are late. Both show as time on
one of the clocks that a short wait should not have taken.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

# How often we look; the most that passes after waking before we know.
LOOK_S = 1.0
# More than a busy machine holds a loop up (protocol/connection/liveness.py), less than what costs
# connections and records.
# Setting the wall's clock looks like a sleep too, and makes us ask and announce once too often.
SLEPT_S = 5.0


async def watch_sleep(wall: Callable[[], float], on_waking: Callable[[float], Awaitable[None]]) -> None:
    """Call `on_waking` with the seconds slept whenever we did, until cancelled. `wall`: unix seconds, uncorrected."""
    while True:
        started, wall_started = trio.current_time(), wall()
        await trio.sleep(LOOK_S)
        passed_s = max(trio.current_time() - started, wall() - wall_started)
        if passed_s >= LOOK_S + SLEPT_S:
            await on_waking(passed_s - LOOK_S)

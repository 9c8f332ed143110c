"""How a peer learns that its machine slept."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from peerd.net.sleep_watch import LOOK_S, watch_sleep


class Wall:
    """Unix seconds that go on with the loop's clock, and alone where we say so."""

    def __init__(self) -> None:
        self.ahead_s = 1_800_000_000.0

    def __call__(self) -> float:
        return trio.current_time() + self.ahead_s


async def _slept(during: Wall, jump_s: float, *, timers_too: bool) -> list[float]:
    found: list[float] = []

    async def note(slept_s: float) -> None:
        await trio.lowlevel.checkpoint()
        found.append(slept_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_sleep, during, note)
        await trio.sleep(100.5)
        assert not found
        if timers_too:
            clock = trio.lowlevel.current_clock()
            assert isinstance(clock, MockClock)
            clock.jump(jump_s)
        else:
            during.ahead_s += jump_s
        await trio.sleep(LOOK_S + 0.1)
        nursery.cancel_scope.cancel()
    return found


@pytest.mark.parametrize("timers_too", [False, True], ids=["the wall alone", "late timers"])
async def test_a_sleep_is_noticed_within_a_second_of_waking(timers_too: bool) -> None:
    assert await _slept(Wall(), 7200, timers_too=timers_too) == [pytest.approx(7200, abs=1)]


@pytest.mark.parametrize("timers_too", [False, True])
async def test_a_busy_moment_is_no_sleep(timers_too: bool) -> None:
    assert await _slept(Wall(), 4, timers_too=timers_too) == []


async def test_a_wall_clock_that_is_set_back_is_no_sleep() -> None:
    assert await _slept(Wall(), -7200, timers_too=False) == []

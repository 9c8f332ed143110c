"""The loop in a thread: results, exceptions, interrupts and ends. For scripts that end in various ways see
test_scripts.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio

from peerd.facade.bridge import Bridge, BridgeClosed
from peerd.protocol.errors import NoChain

pytestmark = pytest.mark.real_time


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    made = Bridge()
    yield made
    made.close()


async def add(one: int, other: int) -> int:
    await trio.lowlevel.checkpoint()
    return one + other


async def fail(error: Exception) -> None:
    await trio.lowlevel.checkpoint()
    raise error


@asynccontextmanager
async def held(error: Exception | None, when: trio.Event) -> AsyncIterator[str]:
    """A background task that fails with `error` after `when`; or entering fails, where `when` is set already."""
    if error is not None and when.is_set():
        raise error
    async with trio.open_nursery() as nursery:

        async def background() -> None:
            await when.wait()
            if error is not None:
                raise error

        nursery.start_soon(background)
        yield "value"
        nursery.cancel_scope.cancel()


def test_a_result_and_an_exception_come_out_as_they_are(bridge: Bridge) -> None:
    assert bridge.call(add, 1, 2) == 3
    error = NoChain("nobody has block 3")
    with pytest.raises(NoChain) as caught:
        bridge.call(fail, error)
    assert caught.value is error


def test_threads_call_at_the_same_time(bridge: Bridge) -> None:
    # Each waits for all others: one after the other they would never get on.
    arrived, all_here = [], trio.Event()

    async def meet() -> None:
        arrived.append(1)
        if len(arrived) == 4:
            all_here.set()
        await all_here.wait()

    threads = [threading.Thread(target=bridge.call, args=(meet,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_a_call_from_the_loops_own_thread_is_refused_instead_of_waiting_for_itself(bridge: Bridge) -> None:
    async def nested() -> int:
        return bridge.call(add, 1, 2)

    with pytest.raises(RuntimeError, match="would wait for itself"):
        bridge.call(nested)


def test_a_closed_bridge_says_so(bridge: Bridge) -> None:
    bridge.close()
    with pytest.raises(BridgeClosed, match="the model was closed"):
        bridge.call(add, 1, 2)
    bridge.close()
    bridge.post(print)


def test_closing_ends_the_calls_that_wait(bridge: Bridge) -> None:
    begun, found = threading.Event(), []

    async def wait() -> None:
        begun.set()
        await trio.sleep_forever()

    def ask() -> None:
        try:
            bridge.call(wait)
        except BridgeClosed as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(10)
    bridge.close()
    thread.join(10)
    assert found == ["the model was closed meanwhile"]


def test_a_call_in_several_tasks_ends_as_one_task_does_when_the_bridge_is_closed(bridge: Bridge) -> None:
    begun, found = threading.Event(), []

    async def wait() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(trio.sleep_forever)
            begun.set()

    def ask() -> None:
        try:
            bridge.call(wait)
        except BridgeClosed as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(10)
    bridge.close()
    thread.join(10)
    assert found == ["the model was closed meanwhile"]


def test_a_held_manager_is_entered_once_and_left_by_its_close(bridge: Bridge) -> None:
    value, close = bridge.hold(held(None, trio.Event()))
    assert value == "value"
    close()
    assert bridge.call(add, 1, 1) == 2


def test_a_manager_that_cannot_be_entered_raises_its_own_exception(bridge: Bridge) -> None:
    broken = trio.Event()
    broken.set()
    with pytest.raises(NoChain, match="at the door"):
        bridge.hold(held(NoChain("at the door"), broken))
    assert bridge.call(add, 1, 1) == 2


def test_a_manager_that_fails_later_does_not_end_the_loop(bridge: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    when = trio.Event()
    _, close = bridge.hold(held(ValueError("later"), when))
    with caplog.at_level(logging.ERROR, logger="peerd.facade.bridge"):
        bridge.post(when.set)
        close()
    assert "a model's background task has failed" in caplog.text
    assert bridge.call(add, 1, 1) == 2


def test_a_forgotten_bridge_can_be_stopped_by_a_finalizer(bridge: Bridge) -> None:
    class Owner:
        """What the bridge works for."""

    owner = Owner()
    weakref.finalize(owner, bridge.stop)
    del owner
    gc.collect()
    bridge._thread.join(10)
    assert not bridge.usable

"""The thread of one device: blocking functions run there one at a time, and the Trio thread waits for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")
A = TypeVar("A")


class RunBatch(Protocol):
    """Runs a blocking function of one argument, such as an engine's `run`, and waits for it."""

    async def __call__(self, run: Callable[[A], T], argument: A, /) -> T: ...


class DeviceThread:
    """Runs functions that use the tensors of one device. `lock` is held by the task that plans what runs next.

    run_batch: runs the engine's blocking part; None hands it to a worker thread. With a `run_batch` nothing else needs
        a thread either (an engine without a device).
    """

    def __init__(self, run_batch: RunBatch | None = None) -> None:
        self.lock = trio.Lock()
        """Held while a batch is planned and run, so that work between two batches never meets an older plan."""
        self.run_batch: RunBatch = run_batch or self._in_thread
        """Runs a batch, or a turn of other work. If cancelled, it returns only when that has ended."""
        self._is_threaded = run_batch is None
        self._limiter = trio.CapacityLimiter(1)

    async def call(self, work: Callable[[], T]) -> T:
        """`work()`, by the task that holds `lock`. If cancelled, it returns only when `work` has ended."""
        if self._is_threaded:
            return await trio.to_thread.run_sync(work, limiter=self._limiter)
        return work()

    async def _in_thread(self, run: Callable[[A], T], argument: A, /) -> T:
        return await trio.to_thread.run_sync(run, argument, limiter=self._limiter)

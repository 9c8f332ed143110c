"""Runs a Trio loop in a thread of its own, for programs without Trio.

`call` runs an async function in the loop and blocks the caller until it has ended. The hard parts are the ends: Ctrl-C
in the waiting thread, a process that forks, a model that is garbage-collected, and the interpreter's exit.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar, cast

import outcome
import trio

from peerd.trio_tools import the_only_error

log = logging.getLogger(__name__)

T = TypeVar("T")
# How long an interrupted call may take to end in the loop before the interrupt goes on without it.
CANCEL_S = 2.0
# How long `close` waits for the loop's thread.
CLOSE_S = 5.0


class BridgeClosed(RuntimeError):
    """The loop has ended, or belongs to another process."""


class _Job:
    """One call: what runs in the loop, and the lock for which its caller waits."""

    __slots__ = ("args", "async_fn", "done", "result", "scope")

    def __init__(self, async_fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        self.async_fn, self.args = async_fn, args
        self.done = threading.Lock()
        self.done.acquire()
        self.result: outcome.Outcome[Any] | None = None
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        try:
            with self.scope:
                result = await outcome.acapture(self.async_fn, *self.args)
                # Trio's own Cancelled must not leave the loop: the caller was interrupted, or the loop ends.
                if isinstance(result, outcome.Error) and _is_cancelled(result.error):
                    raise result.error
                self.result = result
        finally:
            self.done.release()


def _is_cancelled(error: BaseException) -> bool:
    """Whether this is a cancellation, or a group of nothing else, as nurseries raise it."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


class Bridge:
    """`call` runs async functions; `hold` keeps async context managers open. Use it from any thread but its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._jobs: set[_Job] = set()
        self._crash: BaseException | None = None
        started = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(started,), name="peerd", daemon=True)
        self._thread.start()
        started.wait()
        # At exit, Python runs the functions registered with `threading` before it prevents new threads, and those of
        # `atexit` after that. Trio may still need worker threads while the loop ends, so the former is used.
        reference = weakref.ref(self)

        def close_at_exit() -> None:
            bridge = reference()
            if bridge is not None:
                bridge.close()

        self._at_exit = close_at_exit
        # This is a private name; without it, `atexit` serves nearly as well.
        register: Callable[..., object] = getattr(threading, "_register_atexit", atexit.register)
        register(close_at_exit)

    def _forget_exit(self) -> None:
        atexit.unregister(self._at_exit)

    def _main(self, started: threading.Event) -> None:
        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            async with trio.open_nursery() as self._nursery:
                started.set()
                await trio.sleep_forever()

        try:
            trio.run(main)
        except BaseException as error:
            self._crash = error
        finally:
            started.set()
            for job in list(self._jobs):
                if job.result is None and job.done.locked():
                    job.done.release()

    @property
    def usable(self) -> bool:
        """Whether the loop runs, and in this process."""
        return os.getpid() == self._pid and self._thread.is_alive()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Have `function` called in the loop soon. Does nothing if there is no loop any more."""
        if self.usable and self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function, *args)

    def call(self, async_fn: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run the function in the loop and wait for its result. Its exception is raised unchanged.

        If Ctrl-C interrupts the caller, the function is cancelled in the loop, for at most CANCEL_S, before the
        interrupt goes on. Raises BridgeClosed once the loop has ended and in forked processes, RuntimeError in the
        loop's own thread.
        """
        if os.getpid() != self._pid:
            raise BridgeClosed("this model belongs to the parent process: open it again after the fork")
        if threading.current_thread() is self._thread:
            raise RuntimeError("a blocking call in the loop's own thread would wait for itself")
        if not self._thread.is_alive():
            raise BridgeClosed("the model was closed") from self._crash
        job = _Job(async_fn, args)
        self._jobs.add(job)
        try:
            assert self._token is not None
            try:
                self._token.run_sync_soon(self._start, job)
            except trio.RunFinishedError:
                raise BridgeClosed("the model was closed") from self._crash
            try:
                job.done.acquire()
            except BaseException:
                self.post(job.scope.cancel)
                job.done.acquire(timeout=CANCEL_S)
                raise
        finally:
            self._jobs.discard(job)
        if job.result is None:
            raise BridgeClosed("the model was closed meanwhile") from self._crash
        return cast(T, job.result.unwrap())

    def _start(self, job: _Job) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(job.run)

    def hold(self, manager: AbstractAsyncContextManager[T]) -> tuple[T, Callable[[], None]]:
        """Enter `manager` in the loop. Returns its value, and a function that leaves it again and waits for that.

        A manager that crashes later does not end the loop: the crash is logged, and its user gets an error at the next
        call.
        """
        leave, left = trio.Event(), trio.Event()

        async def keep(task_status: trio.TaskStatus[T]) -> None:
            is_open = False
            try:
                async with manager as value:
                    task_status.started(value)
                    is_open = True
                    del value
                    await leave.wait()
            except Exception:
                if not is_open:
                    raise
                log.exception("a model's background task has failed")
            finally:
                left.set()

        async def enter() -> T:
            assert self._nursery is not None
            try:
                started: Any = await self._nursery.start(keep)
            except BaseExceptionGroup as group:
                raise the_only_error(group) from None
            return cast(T, started)

        async def exit_it() -> None:
            leave.set()
            await left.wait()

        def close() -> None:
            if self.usable:
                with suppress(BridgeClosed):
                    self.call(exit_it)

        return self.call(enter), close

    def stop(self) -> None:
        """Begin to end everything in the loop, without waiting, so that a finalizer may call this."""
        self._forget_exit()
        if self._nursery is not None:
            self.post(self._nursery.cancel_scope.cancel)

    def close(self) -> None:
        """End everything that runs in the loop, and wait for it."""
        self._forget_exit()
        if os.getpid() != self._pid or not self._thread.is_alive():
            return
        if self._nursery is not None:
            self.post(self._nursery.cancel_scope.cancel)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)

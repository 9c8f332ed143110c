"""The answers that this daemon gives now: how many there may be, and how they end when it stops."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from peerd.api.errors import ApiError

# Each answer holds a session on every peer of a chain; above this number callers are told to come back later.
MAX_ANSWERING = 128
# For telling those whose answers are cut off.
_GOODBYE_S = 1.0

T = TypeVar("T")


class Answering:
    """Counts the answers. `drain` lets them finish, for a while."""

    def __init__(self, most: int = MAX_ANSWERING) -> None:
        self._most = most
        self._count = 0
        self._is_draining = False
        self._is_over = False
        # Each waits for the next piece of an answer.
        self._waiting: set[trio.CancelScope] = set()
        self._left = trio.Event()

    def __repr__(self) -> str:
        state = "over" if self._is_over else "draining" if self._is_draining else "open"
        return f"<Answering {self._count}/{self._most} {state}>"

    @property
    def count(self) -> int:
        """How many answers are given now."""
        return self._count

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one answer, until its last byte is sent. Raises ApiError if there is none, or we are stopping."""
        if self._is_draining:
            raise _stopping()
        if self._count >= self._most:
            retry = {"Retry-After": "2"}
            busy = f"{self._most} requests are being answered already"
            raise ApiError(429, busy, code="overloaded", kind="rate_limit_error", headers=retry)
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            self._left.set()
            self._left = trio.Event()

    async def pieces(self, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The pieces of an answer as they come. Raises ApiError when the daemon cannot wait for the next one."""
        while not self._is_over:
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    piece = await anext(source)
                except StopAsyncIteration:
                    return
                finally:
                    self._waiting.discard(scope)
            if scope.cancelled_caught:
                break
            yield piece
        raise _stopping()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new answers, and wait at most `timeout_s` for the others; then end those with an error."""
        self._is_draining = True
        with trio.move_on_after(timeout_s):
            await self._wait_for_all()
        self._is_over = True
        for scope in self._waiting:
            scope.cancel()
        with trio.move_on_after(_GOODBYE_S):
            await self._wait_for_all()

    async def _wait_for_all(self) -> None:
        while self._count:
            await self._left.wait()


def _stopping() -> ApiError:
    retry = {"Retry-After": "5"}
    return ApiError(503, "this daemon is stopping", code="stopping", kind="server_error", headers=retry)

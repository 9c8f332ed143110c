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


class Place:
    """The place of one answer."""

    def __init__(self) -> None:
        self.is_cancelled = False
        #: Waits for the answer's next piece; None while nothing is waited for.
        self.waiting: trio.CancelScope | None = None

    def cancel(self) -> None:
        """End the answer with an error."""
        self.is_cancelled = True
        self.stop_waiting()

    def stop_waiting(self) -> None:
        """Give up the next piece."""
        if self.waiting is not None:
            self.waiting.cancel()


class Answering:
    """Counts the answers, and ends those that are cancelled by name. `drain` lets them finish, for a while."""

    def __init__(self, most: int = MAX_ANSWERING) -> None:
        self._most = most
        self._count = 0
        self._is_draining = False
        self._is_over = False
        self._places: set[Place] = set()
        # By the names that clients may know an answer by.
        self._named: dict[str, Place] = {}
        self._left = trio.Event()

    def __repr__(self) -> str:
        state = "over" if self._is_over else "draining" if self._is_draining else "open"
        return f"<Answering {self._count}/{self._most} {state}>"

    @property
    def count(self) -> int:
        """How many answers are given now."""
        return self._count

    @contextmanager
    def place(self, *names: str) -> Iterator[Place]:
        """A place for one answer, until its last byte is sent. Raises ApiError if there is none, or we are stopping."""
        if self._is_draining:
            raise _stopping()
        if self._count >= self._most:
            retry = {"Retry-After": "2"}
            busy = f"{self._most} requests are being answered already"
            raise ApiError(429, busy, code="overloaded", kind="rate_limit_error", headers=retry)
        place = Place()
        self._count += 1
        self._places.add(place)
        own = [name for name in dict.fromkeys(names) if name not in self._named]
        self._named |= dict.fromkeys(own, place)
        try:
            yield place
        finally:
            self._count -= 1
            self._places.discard(place)
            for name in own:
                del self._named[name]
            self._left.set()
            self._left = trio.Event()

    def cancel(self, name: str) -> bool:
        """End the answer of that name with an error. False if there is none."""
        place = self._named.get(name)
        if place is not None:
            place.cancel()
        return place is not None

    async def pieces(self, source: AsyncGenerator[T, None], place: Place) -> AsyncGenerator[T, None]:
        """The pieces of an answer as they come. Raises ApiError when it is cancelled, and when the daemon cannot wait
        for the next one.
        """
        while not (self._is_over or place.is_cancelled):
            with trio.CancelScope() as place.waiting:
                try:
                    piece = await anext(source)
                except StopAsyncIteration:
                    return
            is_cut_off, place.waiting = place.waiting.cancelled_caught, None
            if is_cut_off:
                break
            yield piece
        raise _cancelled() if place.is_cancelled else _stopping()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new answers, and wait at most `timeout_s` for the others; then end those with an error."""
        self._is_draining = True
        with trio.move_on_after(timeout_s):
            await self._wait_for_all()
        self._is_over = True
        for place in self._places:
            place.stop_waiting()
        with trio.move_on_after(_GOODBYE_S):
            await self._wait_for_all()

    async def _wait_for_all(self) -> None:
        while self._count:
            await self._left.wait()


def _cancelled() -> ApiError:
    return ApiError(409, "the request was cancelled", code="cancelled")


def _stopping() -> ApiError:
    retry = {"Retry-After": "5"}
    return ApiError(503, "this daemon is stopping", code="stopping", kind="server_error", headers=retry)

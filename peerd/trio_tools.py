"""Nurseries for `open_*` functions, from which a caller's exception leaves as it came in.

Trio wraps exceptions that leave a nursery in an exception group. A caller who writes `except NoChain` must not have to
know that there is a nursery, so a group with a single exception is unwrapped here, once.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Generic, TypeVar

import trio


@asynccontextmanager
async def open_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery for background tasks. It is cancelled when the body ends; a single exception leaves it unwrapped."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        only = the_only_error(group)
        raise only from only.__cause__


T = TypeVar("T")


async def at_once(functions: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Call all functions at the same time and return their results in order. The first exception cancels the others."""
    results: dict[int, T] = {}

    async def one(index: int) -> None:
        results[index] = await functions[index]()

    try:
        async with trio.open_nursery() as nursery:
            for index in range(len(functions)):
                nursery.start_soon(one, index)
    except BaseExceptionGroup as group:
        only = the_only_error(group)
        raise only from only.__cause__
    return [results[index] for index in range(len(functions))]


def the_only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The only exception in `group`, not counting cancellations; the group itself if there are several."""
    leaves = [leaf for leaf in _leaves(group) if not isinstance(leaf, trio.Cancelled)]
    return leaves[0] if len(leaves) == 1 else group


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def tell(listeners: Iterable[Callable[[], None]]) -> None:
    """Call each of these functions, which must not wait."""
    for listener in listeners:
        listener()


class Watched(Generic[T]):
    """A value that changes, and that tasks follow. A task that is late sees the last change only."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._changed = trio.Event()

    def __repr__(self) -> str:
        return f"<Watched {self._value!r}>"

    @property
    def value(self) -> T:
        """The value now."""
        return self._value

    def set(self, value: T) -> None:
        """Change the value; an equal one changes nothing."""
        if value != self._value:
            self._value = value
            self._changed.set()
            self._changed = trio.Event()

    async def follow(self, use: Callable[[T], None]) -> None:
        """Call `use` with the value now and after each change, until cancelled."""
        while True:
            changed = self._changed
            use(self._value)
            await changed.wait()


async def import_in_thread(*modules: str) -> None:
    """Import modules that load torch. That takes seconds, in which other peers would think us dead if it blocked."""
    for module in modules:
        if module not in sys.modules:
            await trio.to_thread.run_sync(import_module, module)

"""Lets `async def` tests run under Trio, on a mock clock unless they ask for the real one.

A mock clock that jumps whenever all tasks wait makes time-outs instant and deterministic. A test that waits for worker
threads or real sockets must be marked `real_time`, or the clock would jump past them.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from hypothesis import settings
from trio.testing import MockClock

# A bug that a daemon would contain and outlive must fail the test that meets it, in processes that tests start as well.
os.environ["PEERD_STRICT"] = "1"
# The daemon of whoever runs the tests may have a file.
os.environ["PEERD_CONFIG"] = os.devnull
# Daemons of tests must not meet those of other machines, nor each other.
os.environ["PEERD_NO_MDNS"] = "true"

# A hung real-time test must fail, not stall the suite; simulated time needs no such bound. Where much else runs, half a
# dozen processes that import torch take a minute or two.
REAL_TIME_LIMIT_S = 300

# `make check` takes a look; `make test` looks closely, with hypothesis's own number of examples.
settings.register_profile("glance", max_examples=10, deadline=None)


def _run_under_trio(function: Callable[..., Any], real_time: bool) -> Callable[..., None]:
    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        async def bounded() -> None:
            if real_time:
                with trio.fail_after(REAL_TIME_LIMIT_S):
                    await function(**arguments)
            else:
                await function(**arguments)

        trio.run(bounded, clock=None if real_time else MockClock(autojump_threshold=0), strict_exception_groups=True)

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        pyfuncitem.obj = _run_under_trio(pyfuncitem.obj, pyfuncitem.get_closest_marker("real_time") is not None)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Undo what a command that runs inside a test does to logging, for the tests after it."""
    root, own = logging.getLogger(), logging.getLogger("peerd")
    before, levels = tuple(root.handlers), (root.level, own.level)
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
    for logger, level in zip((root, own), levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def closed_terminals_are_heard() -> Iterator[None]:
    """Undoes, for a test and what it starts, what `nohup` does to the tests: SIGHUP is heard."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what lives as long as the run, which is hundreds of thousands of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _leaks_of_this_file() -> Iterator[None]:
    """What a file's tests left open is found now, and fails the last of them, rather than a test of another file."""
    yield
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()

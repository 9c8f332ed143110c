"""The first signal ends a command in order; the previous handler gets the second."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from peerd.cli.stopping import Interrupted, until_signalled
from peerd.protocol.errors import NoChain


async def test_a_signal_cancels_the_work_and_is_reported_after_its_clean_up() -> None:
    cleaned = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep_forever()
        finally:
            cleaned.append(True)

    with pytest.raises(Interrupted) as caught:
        await until_signalled(work)
    assert caught.value.exit_code == 143
    assert cleaned


async def test_a_second_signal_gets_the_handler_of_before() -> None:
    second = trio.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: second.set())

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep_forever()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            with trio.CancelScope(shield=True):
                await second.wait()

    try:
        with pytest.raises(Interrupted):
            await until_signalled(work)
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_work_that_ends_by_itself_ends_the_wait_for_signals() -> None:
    ended = []

    async def work() -> None:
        ended.append(True)

    await until_signalled(work)
    assert ended


async def test_an_error_comes_out_as_it_went_in() -> None:
    async def work() -> None:
        raise NoChain("nobody serves blocks 0:3", ((0, 3),))

    with pytest.raises(NoChain):
        await until_signalled(work)

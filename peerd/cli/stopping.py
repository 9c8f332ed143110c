"""How one-shot commands end on SIGINT, SIGTERM and SIGHUP. The library itself does not touch signals.

A user may press Ctrl-C twice. The first one starts an orderly end. Then the previous handlers are restored, so the
second one ends the process whatever the clean-up is doing.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

from peerd.trio_tools import open_tasks


class Interrupted(Exception):
    """A signal ended the work, which has cleaned up. `exit_code` is that of a shell: 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a command. SIGHUP, which a closed terminal sends, is one unless `nohup` started us."""
    ending = (signal.SIGINT, signal.SIGTERM)
    return ending if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*ending, signal.SIGHUP)


async def until_signalled(work: Callable[[], Awaitable[None]]) -> None:
    """Run `work`, which the first signal cancels. Raises Interrupted once it has cleaned up."""
    received: list[int] = []

    async def watch(task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*stop_signals()) as signals:
            task_status.started()
            async for number in signals:
                received.append(number)
                break
        tasks.cancel_scope.cancel()

    async with open_tasks() as tasks:
        await tasks.start(watch)
        await work()
    if received:
        raise Interrupted(received[0])

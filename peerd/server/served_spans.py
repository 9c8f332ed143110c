"""A span that this peer serves, and the task of its engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from peerd.protocol.span import Span
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import AdapterRoom


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """Blocks of one model that this peer serves, the engine that runs them, and the memory for clients' own
    adapters.
    """

    model: bytes
    max_length: int
    task: EngineTask
    adapter_room: AdapterRoom = field(default_factory=AdapterRoom)

    @property
    def span(self) -> Span:
        return self.task.engine.span


class _Running:
    """The running task of one span's engine."""

    def __init__(self, task: EngineTask) -> None:
        self.leaving = False
        self._task = task
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def run(self) -> None:
        try:
            with self._scope:
                await self._task.run()
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """End the task, after the batch that it runs."""
        self._scope.cancel()
        await self._ended.wait()

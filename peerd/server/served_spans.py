"""A span that this peer serves, and the task of its engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from peerd.net.containment import Containment
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

    def __init__(self, task: EngineTask, containment: Containment) -> None:
        self.leaving = False
        self._task = task
        self._containment = containment
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def run(self) -> None:
        try:
            with self._scope:
                with self._containment.around("an engine's task"):
                    await self._task.run()
                # Its sessions wait for nothing now: the host of the span withdraws it.
                self._task.break_down("a bug ended its engine's task")
                await trio.sleep_forever()
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """End the task, after the batch that it runs."""
        self._scope.cancel()
        await self._ended.wait()

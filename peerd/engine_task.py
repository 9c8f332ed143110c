"""The task that owns one device: it hands packed batches to a worker thread and results to sessions.

Knows the engine, time and the thread; knows no streams. All of a span's tensors belong to that thread:
everything else here runs between two batches, on Trio's side. A batch that has begun is not cut short:
closing waits for it, which the engine's token budget bounds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Protocol

import trio

from peerd.admission import Admission
from peerd.compute.engine import Batch, BatchOutput, Engine, EngineStep, StepResult

Deliver = Callable[[StepResult], None]
RunBatch = Callable[[Callable[[Batch], BatchOutput], Batch], Awaitable[BatchOutput]]


class EngineTask:
    """One engine, its device thread, and the sessions that wait for its results."""

    def __init__(self, engine: Engine, *, run_batch: RunBatch | None = None) -> None:
        self.engine = engine
        self.admission = Admission(engine.total_tokens, lambda: engine.free_tokens)
        self._limiter = trio.CapacityLimiter(1)
        self._run_batch = run_batch or self._in_thread
        self._deliver: dict[Hashable, Deliver] = {}
        self._work = trio.Event()

    def __repr__(self) -> str:
        return f"<EngineTask {self.engine.span} sessions={len(self._deliver)} free={self.engine.free_tokens}>"

    async def run(self) -> None:
        """Run batches until cancelled."""
        while True:
            batch = self.engine.plan()
            if batch is None:
                self._work = trio.Event()
                await self._work.wait()
                continue
            output = await self._run_batch(self.engine.run, batch)
            for result in self.engine.collect(batch, output):
                # A session may have closed while its batch ran.
                if deliver := self._deliver.get(result.session):
                    deliver(result)

    async def open(
        self, session: Hashable, owner: Hashable, deliver: Deliver, *, timeout_s: float, **wanted: Any
    ) -> None:
        """Commit KV for `session`, waiting for room. `wanted` is what `Engine.open` takes.

        Raises NoRoom, ContextTooLong, InvalidRequest.
        """
        tokens = self.engine.tokens_wanted(**wanted)
        await self.admission.admit(owner, tokens, lambda: self.engine.open(session, **wanted), timeout_s)
        self._deliver[session] = deliver

    def submit(self, step: EngineStep) -> None:
        """Queue a step. Raises what `Engine.submit` raises."""
        self.engine.submit(step)
        self._work.set()

    def hold(self, session: Hashable, held: bool) -> None:
        """Whether the session is left out of batches, because its results pile up unsent."""
        self.engine.hold(session, held)
        self._work.set()

    def close(self, session: Hashable, owner: Hashable, tokens: int) -> None:
        """Free what the session holds."""
        del self._deliver[session]
        self.engine.close(session)
        self.admission.release(owner, tokens)

    async def _in_thread(self, run: Callable[[Batch], BatchOutput], batch: Batch) -> BatchOutput:
        return await trio.to_thread.run_sync(run, batch, limiter=self._limiter)

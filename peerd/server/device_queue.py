"""Queues work for a device's thread beside inference, such as training, and decides whose turn it is.

A `Work` is long and is done in turns, so that a batch of inference waits only for one turn. Only one work runs at a
time, because each holds memory on the device while it runs. Between two works, owners take turns.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import outcome
import trio

from peerd.protocol.errors import Overloaded

# Even if sessions keep the device busy, jobs get this share of its time, so that training always advances.
SHARE = 1 / 8
# An idle device runs turns for this long before it checks for inference again; each hand-over costs 0.1 ms.
SLICE_S = 0.02
# How many jobs one owner may have waiting, and all owners together. Their memory is limited elsewhere.
MAX_JOBS_AN_OWNER = 32
MAX_JOBS = 256


class Work(Protocol):
    """A long computation for the device's thread. It keeps its own result."""

    def turn(self) -> bool:
        """Do some milliseconds of it, and return whether all of it is done. Device thread."""


@dataclass(slots=True, eq=False)
class Job:
    """A work that a caller waits for."""

    owner: Hashable
    work: Work
    done: trio.Event = field(default_factory=trio.Event)
    result: outcome.Maybe[None] | None = None

    def end(self, result: outcome.Maybe[None]) -> None:
        """Record that the work is done or failed."""
        self.result = result
        self.done.set()


class WorkQueue:
    """The jobs of many owners. Only one runs at a time; each owner's jobs run in order, and owners take turns.

    `spent_on_job` and `spent_on_inference` tell it how the device's time was spent, which decides when jobs had their
    share.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        self._running: Job | None = None
        # Seconds of inference that must pass before the next turn, if there is inference.
        self._owed_s = 0.0

    def __repr__(self) -> str:
        return f"<WorkQueue running={self._running is not None} waiting={self._count}>"

    @property
    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, owner: Hashable, work: Work) -> Job:
        """Queue a job. Raises Overloaded if too many wait."""
        own = self._waiting.get(owner, ())
        if len(own) >= MAX_JOBS_AN_OWNER or self._count >= MAX_JOBS:
            raise Overloaded(f"{self._count} training passes wait here already, {len(own)} of them yours")
        job = Job(owner, work)
        self._waiting.setdefault(owner, deque()).append(job)
        return job

    def leave(self, job: Job) -> None:
        """Remove a job that has ended or for which its caller no longer waits: it gets no further turn."""
        if self._running is job:
            self._running = None
        own = self._waiting.get(job.owner)
        if own is not None and job in own:
            own.remove(job)
            if not own:
                del self._waiting[job.owner]

    def due(self, *, inference_ready: bool) -> Job | None:
        """The job whose turn it is now; None if inference goes first, or nothing waits."""
        if inference_ready and self._owed_s > 0:
            return None
        if self._running is None or self._running.done.is_set():
            self._running = self._next()
        return self._running

    def spent_on_job(self, seconds: float) -> None:
        """Note that a turn took `seconds`: inference, if there is any, may now use its share of the time."""
        self._owed_s = seconds * (1 / SHARE - 1)

    def spent_on_inference(self, seconds: float) -> None:
        """Note that a batch took `seconds`."""
        self._owed_s -= seconds

    def _next(self) -> Job | None:
        if not self._waiting:
            return None
        owner, own = next(iter(self._waiting.items()))
        job = own.popleft()
        del self._waiting[owner]
        if own:
            # The owner goes to the end of the queue of owners.
            self._waiting[owner] = own
        return job


def run_slice(work: Work) -> outcome.Maybe[bool]:
    """Run at least one turn, and more until SLICE_S has passed or the work is done. Device thread."""
    until = time.perf_counter() + SLICE_S
    while True:
        result: outcome.Maybe[Any] = outcome.capture(work.turn)
        if isinstance(result, outcome.Error) or result.value or time.perf_counter() >= until:
            return result

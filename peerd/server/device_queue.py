"""Work for a device's thread beside inference: what waits for it, and whose turn it is.

Knows owners, jobs and the share of time that jobs get; knows no tensors and no thread. A `Work` is long and
is done in turns, so that a batch of inference never waits for all of it. Only one runs at a time, since each
holds memory on the device while it runs; between two of them, owners take turns.
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

# While sessions keep the device busy, jobs still get this share of its time, so that training never starves.
SHARE = 1 / 8
# An idle device runs turns for so long before it looks for inference again: handing over costs 0.1 ms.
SLICE_S = 0.02
# Jobs that one owner may have waiting, and all together. What they hold in memory is bounded elsewhere.
MAX_JOBS_AN_OWNER = 32
MAX_JOBS = 256


class Work(Protocol):
    """Something long for the device's thread. Its result is its own business."""

    def turn(self) -> bool:
        """Do a little of it, some milliseconds, and say whether all is done. Device thread."""


@dataclass(slots=True, eq=False)
class Job:
    """A work and whoever waits for its end."""

    owner: Hashable
    work: Work
    done: trio.Event = field(default_factory=trio.Event)
    result: outcome.Maybe[None] | None = None

    def end(self, result: outcome.Maybe[None]) -> None:
        """The work is done, or failed."""
        self.result = result
        self.done.set()


class WorkQueue:
    """Jobs of many owners: each owner's in order, one of each owner in turn, one at a time.

    `spent_on_*` tell it where the device's time went, from which it knows when jobs have had their share.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        self._running: Job | None = None
        # Seconds of inference that must pass before the next turn, as long as there is inference.
        self._owed_s = 0.0

    def __repr__(self) -> str:
        return f"<WorkQueue running={self._running is not None} waiting={self._count}>"

    @property
    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, owner: Hashable, work: Work) -> Job:
        """Queue a job. Raises Overloaded where too many wait."""
        own = self._waiting.get(owner, ())
        if len(own) >= MAX_JOBS_AN_OWNER or self._count >= MAX_JOBS:
            raise Overloaded(f"{self._count} training passes wait here already, {len(own)} of them yours")
        job = Job(owner, work)
        self._waiting.setdefault(owner, deque()).append(job)
        return job

    def leave(self, job: Job) -> None:
        """The job has ended, or nobody waits for it any more: it gets no further turn."""
        if self._running is job:
            self._running = None
        own = self._waiting.get(job.owner)
        if own is not None and job in own:
            own.remove(job)
            if not own:
                del self._waiting[job.owner]

    def due(self, *, inference_ready: bool) -> Job | None:
        """The job whose turn it is now; None where inference goes first, or nothing waits."""
        if inference_ready and self._owed_s > 0:
            return None
        if self._running is None or self._running.done.is_set():
            self._running = self._next()
        return self._running

    def spent_on_job(self, seconds: float) -> None:
        """A turn took so long: inference, where there is any, now gets what is its share beside it."""
        self._owed_s = seconds * (1 / SHARE - 1)

    def spent_on_inference(self, seconds: float) -> None:
        """A batch took so long."""
        self._owed_s -= seconds

    def _next(self) -> Job | None:
        if not self._waiting:
            return None
        owner, own = next(iter(self._waiting.items()))
        job = own.popleft()
        del self._waiting[owner]
        if own:
            # To the end of the queue of owners.
            self._waiting[owner] = own
        return job


def run_slice(work: Work) -> outcome.Maybe[bool]:
    """Turns for `SLICE_S` or until the work is done, at least one. Device thread."""
    until = time.perf_counter() + SLICE_S
    while True:
        said: outcome.Maybe[Any] = outcome.capture(work.turn)
        if isinstance(said, outcome.Error) or said.value or time.perf_counter() >= until:
            return said

"""The last hour as the daemon saw it: each model's coverage, the tokens answered, and since when each peer serves.

There is a sample for each minute, in memory. Announcements do not contain since when a server serves, so the time
counts from when this daemon first saw it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import trio

SAMPLE_S = 60.0
_SAMPLES = 60


@dataclass(frozen=True, slots=True)
class Sample:
    """One minute. `at`: unix seconds of its end; `tokens`: tokens answered within it, of all models together.

    `coverage`: for each model the share of its blocks that had a server, 0 to 1.
    """

    at: float
    tokens: int
    coverage: Mapping[str, float]


class History:
    """The last hour, in samples of a minute."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)
        self._first_seen: dict[tuple[str, str], float] = {}
        self._tokens = 0

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples, oldest first."""
        return tuple(self._samples)

    def count_token(self) -> None:
        """Note that one token of an answer was produced."""
        self._tokens += 1

    def since(self, model: str, peers: Iterable[str]) -> dict[str, float]:
        """For each of `peers`, which serve `model` now, the unix seconds since when it has been seen without a gap."""
        now = self._wall_clock()
        seen = {(model, peer): self._first_seen.get((model, peer), now) for peer in peers}
        others = {key: at for key, at in self._first_seen.items() if key[0] != model}
        self._first_seen = others | seen
        return {peer: at for (_, peer), at in seen.items()}

    async def run(self, coverage: Callable[[], Awaitable[Mapping[str, float]]]) -> None:
        """Take a sample each `SAMPLE_S`, until cancelled. `coverage` looks at the swarm, and calls `since`."""
        await coverage()
        while True:
            before = self._tokens
            await trio.sleep(SAMPLE_S)
            self._samples.append(Sample(self._wall_clock(), self._tokens - before, await coverage()))

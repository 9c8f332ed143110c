"""A chain of servers in virtual time: links with a delay, and engines that take a set time for a batch.

Each server works on one batch at a time, of everything that has arrived, as the engine does. How long a batch takes was
measured on a real server (`SERVER_S`); so a run gives the same figures everywhere.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import trio

from peerd.protocol.messages.session import Want
from peerd.protocol.rows import Op, RowSlice

# Batches differ by this much. Without it sessions would keep their places in the pipeline for ever, and these decide
# over a tenth of the rate of many sessions.
_JITTER = 0.3


def interpolated(table: Sequence[tuple[int, float]], count: int) -> float:
    """The time for so many positions; beyond the table it goes on as between its last two."""
    counts = [at for at, _ in table]
    place = min(max(bisect_left(counts, count), 1), len(table) - 1)
    (low, low_s), (high, high_s) = table[place - 1], table[place]
    return low_s + (high_s - low_s) * (count - low) / (high - low)


@dataclass(eq=False)
class SimulatedStep:
    """A step on its way. It implements what `Session.submit` returns."""

    positions: int
    hidden: torch.Tensor
    done: trio.Event = field(default_factory=trio.Event)

    @property
    def is_done(self) -> bool:
        return self.done.is_set()

    async def result(self) -> torch.Tensor:
        await self.done.wait()
        return self.hidden

    async def drawn_or_result(self) -> torch.Tensor:
        return await self.result()


class _Server:
    def __init__(
        self, batch_s: Callable[[int], float], luck: random.Random, on_done: Callable[[SimulatedStep], None]
    ) -> None:
        self._batch_s = batch_s
        self._luck = luck
        self._on_done = on_done
        self._waiting: deque[SimulatedStep] = deque()
        self._arrived = trio.Event()

    def take(self, step: SimulatedStep) -> None:
        self._waiting.append(step)
        self._arrived.set()

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while self._waiting:
                batch = list(self._waiting)
                self._waiting.clear()
                positions = sum(step.positions for step in batch)
                await trio.sleep(self._batch_s(positions) * self._luck.uniform(1 - _JITTER, 1 + _JITTER))
                for step in batch:
                    self._on_done(step)


class SimulatedChain:
    """So many servers, with `rtt_s` between any two peers. `run` owns its tasks."""

    def __init__(self, servers: int, rtt_s: float, batch_s: Callable[[int], float], seed: int) -> None:
        self._one_way_s = rtt_s / 2
        self._servers = [
            _Server(batch_s, random.Random(f"{seed} {at}"), partial(self._leave, at)) for at in range(servers)
        ]

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            for server in self._servers:
                self._nursery.start_soon(server.run)
            task_status.started()

    def send(self, step: SimulatedStep) -> None:
        """Send a step from the client to the first server."""
        self._nursery.start_soon(self._travel, -1, step)

    def _leave(self, at: int, step: SimulatedStep) -> None:
        self._nursery.start_soon(self._travel, at, step)

    async def _travel(self, at: int, step: SimulatedStep) -> None:
        await trio.sleep(self._one_way_s)
        if at + 1 < len(self._servers):
            self._servers[at + 1].take(step)
        else:
            step.done.set()


class SimulatedSession:
    """One row of a text that is known in advance: the result for a position names the token after it."""

    closed = False
    chain = ()
    failovers = 0

    def __init__(self, chain: SimulatedChain, text: Sequence[int]) -> None:
        self._chain = chain
        self._text = text

    async def submit(
        self,
        hidden: torch.Tensor,
        *,
        row: int = 0,
        start: int | None = None,
        rows: Sequence[RowSlice] | None = None,
        ops: Sequence[Op] = (),
        want: Want = "last",
        draw: object = None,
    ) -> SimulatedStep:
        """As `Session.submit`."""
        piece = rows[0] if rows else RowSlice(row, start or 0, len(hidden))
        following = [float(self._text[min(at + 1, len(self._text) - 1)]) for at in range(piece.start, piece.end)]
        step = SimulatedStep(piece.count, torch.tensor(following)[:, None])
        self._chain.send(step)
        return step

    async def step(self, hidden: torch.Tensor, *, row: int = 0, start: int = 0, want: Want = "last") -> torch.Tensor:
        """As `Session.step`."""
        return await (await self.submit(hidden, row=row, start=start, want=want)).result()

    def close(self) -> None:
        self.closed = True


def gain(share: float, count: int) -> float:
    """The expected tokens of a step with so many guesses, each right with this probability (arXiv 2211.17192)."""
    return sum(share**place for place in range(count + 1))


def bound(share: float, step_s: Callable[[int], float], most: int) -> float:
    """The gain over plain decoding of the best fixed number of guesses."""
    plain_s = step_s(0)
    return max(gain(share, count) * plain_s / step_s(count) for count in range(most + 1))

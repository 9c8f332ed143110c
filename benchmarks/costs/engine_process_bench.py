"""Measures what a hop would pay if its engine ran in a process of its own: milliseconds a batch, beside a thread.

    python -m benchmarks.costs.engine_process_bench

A device that fails for good (a CUDA assert) spoils the process that uses it, so a process of its own would cost the
span and not the peer. Hidden states would lie in shared memory; the plan of a batch and a wake-up would go through a
pipe, and so back. The work itself is left out: both sides only copy. A worker thread does the same, as engines run
today. The difference is what each hop would pay for each step.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import trio
from numpy.typing import NDArray

from peerd.protocol.rows import RowSlice

TIMES, WARM_UP = 2000, 100
# Steps in a batch, positions of each, width, bytes of a value: a decode, eight decodes, a piece of a prefill.
SIZES = ((1, 1, 4096, 4), (8, 1, 4096, 4), (1, 128, 4096, 2), (1, 128, 8192, 2))
ROOM = 1 << 22
Bytes = NDArray[np.uint8]


def plan(steps: int, positions: int) -> bytes:
    """What a batch says beside its hidden states."""
    pieces = [(number, 7, (), (RowSlice(0, 100, positions),), list(range(8))) for number in range(steps)]
    return pickle.dumps(pieces)


def cells_of(memory: SharedMemory) -> Bytes:
    """The shared memory as bytes."""
    assert memory.buf is not None
    return np.frombuffer(memory.buf, np.uint8)


def serve(name: str, read: int, write: int) -> None:
    """The engine's process: take a batch, copy it, and give it back, until the pipe ends."""
    memory = SharedMemory(name)
    cells = cells_of(memory)
    while message := os.read(read, 65536):
        size, pieces = pickle.loads(message)
        pickle.loads(pieces)
        cells[ROOM : ROOM + size] = cells[:size].copy()
        os.write(write, pickle.dumps(size))
    del cells
    memory.close()


async def in_thread(hidden: Bytes, pieces: bytes) -> Bytes:
    """A batch as engines run it today: the worker shares our memory."""
    return await trio.to_thread.run_sync(hidden.copy)


async def in_process(cells: Bytes, read: int, write: int, hidden: Bytes, pieces: bytes) -> Bytes:
    """A batch in the other process."""
    size = len(hidden)
    cells[:size] = hidden
    os.write(write, pickle.dumps((size, pieces)))
    await trio.lowlevel.wait_readable(read)
    os.read(read, 65536)
    return cells[ROOM : ROOM + size].copy()


async def times(run: Callable[[Bytes, bytes], Awaitable[Bytes]], size: int, pieces: bytes) -> list[float]:
    """Milliseconds of each batch."""
    hidden, found = np.ones(size, np.uint8), []
    for _ in range(WARM_UP + TIMES):
        began = time.perf_counter()
        await run(hidden, pieces)
        found.append(1000 * (time.perf_counter() - began))
        # Steps come when they come, not back to back.
        await trio.sleep(0.001)
    return sorted(found[WARM_UP:])


async def measure(cells: Bytes, read: int, write: int) -> None:
    print("| batch | bytes | thread: median, 99 % | process: median, 99 % | more, median |")
    print("|---|---|---|---|---|")
    for steps, positions, width, value in SIZES:
        size, pieces = steps * positions * width * value, plan(steps, positions)
        thread = await times(in_thread, size, pieces)
        process = await times(partial(in_process, cells, read, write), size, pieces)
        cell = [f"{statistics.median(each):.3f}, {each[int(0.99 * len(each))]:.3f} ms" for each in (thread, process)]
        more = statistics.median(process) - statistics.median(thread)
        print(f"| {steps} x {positions} x {width} | {size / 1024:.0f} KiB | {cell[0]} | {cell[1]} | {more:.3f} ms |")


def main() -> None:
    memory = SharedMemory(create=True, size=2 * ROOM)
    (down_read, down_write), (up_read, up_write) = os.pipe(), os.pipe()
    engine = multiprocessing.get_context("fork").Process(target=serve, args=(memory.name, down_read, up_write))
    engine.start()
    cells = cells_of(memory)
    os.set_blocking(up_read, False)
    try:
        trio.run(measure, cells, up_read, down_write)
    finally:
        engine.kill()
        engine.join()
        del cells
        memory.close()
        memory.unlink()


if __name__ == "__main__":
    main()

"""Measures how fast a block is on this machine: once for each model, dtype, quantization and device.

It measures what a session gets: one position for each step, through the engine, over a KV cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version

import torch

from peerd.compute.device.measurements import device_name, remembered
from peerd.compute.engine.engine import BaseEngine
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice, SessionSize

# A conversation that has just begun. Longer ones are slower, because attention takes longer.
_CONTEXT_TOKENS = 64
_WARM_UP_STEPS = 3
_TIMED_STEPS = 12
# For large blocks on a slow CPU: this time is enough for a measurement, and the operator waits for the server to start.
_ENOUGH_S = 5.0


def measured_throughput(
    engine: BaseEngine,
    model: bytes,
    dtype: torch.dtype,
    quantize: str,
    device: torch.device,
    max_length: int | None = None,
) -> float:
    """Positions a second through one block at batch size 1, from the cache or measured now.

    The engine must not be in use. `model` is the model's digest, and `max_length` the most positions that it takes, if
    it has a limit. A measurement blocks the thread for seconds.
    """
    parts = (model.hex(), str(dtype), quantize, device_name(device), f"{torch.get_num_threads()} threads")
    key = " | ".join((*parts, version("peerd")))
    return remembered("throughput", key, lambda: measure_throughput(engine, max_length))


def measure_throughput(engine: BaseEngine, max_length: int | None = None) -> float:
    """Positions a second through one block when a single session decodes. The engine is left as it was."""
    counted = engine.positions_computed, engine.batches_run
    length = min(_CONTEXT_TOKENS + 1, engine.total_tokens, max_length or engine.total_tokens)
    steps = _Steps(engine, length)
    context = max(0, length - 1)
    try:
        if context and not steps.run(0, context):
            # Random activations may overflow a narrow dtype; here only the time counts.
            context = 0
        for _ in range(_WARM_UP_STEPS):
            steps.run(context, 1)
        times = list(_timed(steps, context))
    finally:
        steps.close()
        engine.positions_computed, engine.batches_run = counted
    return len(engine.span) / statistics.median(times)


def _timed(steps: _Steps, context: int) -> Iterator[float]:
    """Seconds of each step. Each step writes the same position again, so all have the same context."""
    began = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        started = time.perf_counter()
        steps.run(context, 1)
        ended = time.perf_counter()
        yield ended - started
        if ended - began > _ENOUGH_S:
            return


class _Steps:
    """A session for the measurement, run step by step."""

    def __init__(self, engine: BaseEngine, length: int) -> None:
        self._engine = engine
        self._name = object()
        self._seq = 0
        self._random = torch.Generator().manual_seed(0)
        engine.open(self._name, SessionSize(length, max_rollback=1))

    def run(self, start: int, count: int) -> bool:
        """Run `count` positions from `start` on. Returns whether all results were finite."""
        hidden = torch.randn(count, self._engine.hidden_size, generator=self._random)
        self._engine.submit(EngineStep(self._name, self._seq, (), (RowSlice(0, start, count),), hidden))
        self._seq += 1
        well = True
        while (batch := self._engine.plan()) is not None:
            well &= all(result.error is None for result in self._engine.collect(batch, self._engine.run(batch)))
        return well

    def close(self) -> None:
        self._engine.close(self._name)

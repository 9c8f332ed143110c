"""How fast a block is here: measured once for each model, dtype, quantization and device, and remembered.

What is measured is what a session gets: one position a step, through the engine, over a KV cache. Knows engines and one
file in the user's cache folder. The difficulty is peers that start together: each would slow the others'
measurements down, so that whoever has the file's lock measures while the others wait and then read.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import torch

from peerd.compute.engine.engine import BaseEngine
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice

log = logging.getLogger(__name__)

# A conversation that has just begun. Longer ones are slower, by what attention takes.
_CONTEXT_TOKENS = 64
_WARM_UP_STEPS = 3
_TIMED_STEPS = 12
# Large blocks on a slow CPU: so much is enough to know, and whoever starts a server waits for it.
_ENOUGH_S = 5.0
# Who waits longer than this for others that measure does so itself, beside them.
_LOCK_TIMEOUT_S = 60.0


def measured_throughput(
    engine: BaseEngine, model: bytes, dtype: torch.dtype, quantize: str, device: torch.device
) -> float:
    """Positions a second through one block, at batch 1: remembered, or else measured now.

    Nobody may use the engine yet. `model` is the model's digest. Blocks the thread, for seconds unless others measure.
    """
    parts = (model.hex(), str(dtype), quantize, _device_name(device), f"{torch.get_num_threads()} threads")
    key = " | ".join((*parts, version("peerd")))
    path = Path(platformdirs.user_cache_dir("peerd")) / "throughput.json"
    with _locked(path):
        rates = _read(path)
        if (known := rates.get(key)) is not None:
            return known
        rate = measure_throughput(engine)
        # Not what was read before measuring: without the lock somebody else may have written since.
        _write(path, {**_read(path), key: rate})
    return rate


def measure_throughput(engine: BaseEngine) -> float:
    """Positions a second through one block when a single session decodes. The engine is left as it was."""
    counted = engine.positions_computed, engine.batches_run
    steps = _Steps(engine)
    context = max(0, min(_CONTEXT_TOKENS, engine.total_tokens - 1))
    try:
        if context and not steps.run(0, context):
            # Activations that no model would make may overflow a narrow dtype; time is what is asked for here.
            context = 0
        for _ in range(_WARM_UP_STEPS):
            steps.run(context, 1)
        times = list(_timed(steps, context))
    finally:
        steps.close()
        engine.positions_computed, engine.batches_run = counted
    return len(engine.span) / statistics.median(times)


def _timed(steps: _Steps, context: int) -> Iterator[float]:
    """Seconds of each step. Each writes the same position anew, so all have the same context."""
    began = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        started = time.perf_counter()
        steps.run(context, 1)
        ended = time.perf_counter()
        yield ended - started
        if ended - began > _ENOUGH_S:
            return


class _Steps:
    """A session of its own, run step by step."""

    def __init__(self, engine: BaseEngine) -> None:
        self._engine = engine
        self._name = object()
        self._seq = 0
        self._random = torch.Generator().manual_seed(0)
        engine.open(self._name, max_length=min(_CONTEXT_TOKENS + 1, engine.total_tokens), max_rows=1, max_rollback=1)

    def run(self, start: int, count: int) -> bool:
        """Run `count` positions from `start` on. Whether all went well."""
        hidden = torch.randn(count, self._engine.hidden_size, generator=self._random)
        self._engine.submit(EngineStep(self._name, self._seq, (), (RowSlice(0, start, count),), hidden))
        self._seq += 1
        well = True
        while (batch := self._engine.plan()) is not None:
            well &= all(result.error is None for result in self._engine.collect(batch, self._engine.run(batch)))
        return well

    def close(self) -> None:
        self._engine.close(self._name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with the file, if that can be had: without it the worst is a measurement too many."""
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except (OSError, filelock.Timeout) as error:
        log.info("measuring the throughput without a lock on %s: %s", path, error)
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> dict[str, float]:
    """What is remembered; of a damaged file, what can be understood."""
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: float(rate) for key, rate in found.items() if type(rate) in (int, float) and 0 < rate < 1e12}


def _write(path: Path, rates: dict[str, float]) -> None:
    """Whole or not at all; a cache that cannot be written costs only time."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(rates, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        log.info("the measured throughput is not remembered: %s", error)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return device.type
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), device.type)

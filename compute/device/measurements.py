"""Remembers figures that were measured on this machine in a file of the user's cache folder.

Peers that start together would slow each other's measurements down. So one of them measures while it holds the file's
lock; the others wait, and then read the file. A lock or a file that cannot be had costs time, but never prevents a
start.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import torch

log = logging.getLogger(__name__)

# A peer that has waited this long for another peer's measurement measures at the same time as that peer.
_LOCK_TIMEOUT_S = 60.0


def remembered(name: str, key: str, measure: Callable[[], float]) -> float:
    """The figure under `key` in the cache file `name.json`; if there is none, measure it now and remember it.

    Blocks the thread while another process measures and while `measure` runs. Figures lie between 0 and 1e12.
    """
    path = Path(platformdirs.user_cache_dir("peerd")) / f"{name}.json"
    with _locked(path):
        if (known := _read(path).get(key)) is not None:
            return known
        figure = measure()
        # The file is read again, since without the lock another process may have written to it meanwhile.
        _write(path, {**_read(path), key: figure})
    return figure


def device_name(device: torch.device) -> str:
    """The model name of the GPU or CPU; the device's type if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return device.type
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), device.type)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except (OSError, filelock.Timeout) as error:
        log.info("measuring without a lock on %s: %s", path, error)
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> dict[str, float]:
    """The remembered figures; of a damaged file, those that can be read."""
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: float(value) for key, value in found.items() if type(value) in (int, float) and 0 < value < 1e12}


def _write(path: Path, figures: dict[str, float]) -> None:
    """Replace the file atomically."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(figures, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        log.info("cannot save the measurement: %s", error)

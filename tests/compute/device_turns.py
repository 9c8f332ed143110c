"""Runs passes where there is no engine task to share the device's time."""

from __future__ import annotations

from collections.abc import Iterable

from peerd.compute.training.passes import TrainingWork


def device_turns(works: Iterable[TrainingWork]) -> None:
    """Run works to their ends in this thread."""
    for work in works:
        while not work.turn():
            pass

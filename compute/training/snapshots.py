"""Keeps a trained span on the disk: weights and the optimizer's state, so that a crash loses only unsaved steps.

A snapshot is a folder that appears whole or not at all. Folders are numbered as they were written. So going back to an
older step and saving again makes the newest snapshot, whatever its step.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from peerd.compute.checkpoint.checkpoint import read_json
from peerd.compute.checkpoint.safetensors_file import SafetensorsFile
from peerd.compute.checkpoint.trained import BLOCKS, block_digests, write_tensors
from peerd.compute.errors import CheckpointError, NonFiniteError
from peerd.compute.training.span_trainer import SpanTrainer

_STATE, _FACTS, _TEMPORARY = "optimizer.safetensors", "training.json", "unfinished-"
# The newest, and two to go back to. Each has three times the size of the blocks in fp32.
KEPT = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot: the folder, its number among all, and how many steps it is away from the published weights."""

    folder: Path
    number: int
    step: int

    @property
    def blocks(self) -> Path:
        """The file with the blocks' weights."""
        return self.folder / BLOCKS


class Snapshots:
    """The snapshots in one folder, all of one client's copy of one span."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> list[Snapshot]:
        """The snapshots, the oldest first."""
        found = []
        for path in self._folder.glob("*-step-*"):
            number, _, step = path.name.partition("-step-")
            if number.isdecimal() and step.isdecimal():
                found.append(Snapshot(path, int(number), int(step)))
        return sorted(found, key=lambda snapshot: snapshot.number)

    def newest(self, step: int | None = None) -> Snapshot | None:
        """The newest snapshot of a step, or of all; None if there is none."""
        return next((each for each in reversed(self.all()) if step in (None, each.step)), None)

    def write(self, trainer: SpanTrainer) -> tuple[Snapshot, dict[int, bytes]]:
        """Write a snapshot and delete the oldest ones; returns it with its blocks' digests.

        Raises OSError, and NonFiniteError if a weight is NaN or infinite.
        """
        tensors = trainer.tensors()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise NonFiniteError(f"a weight of blocks {trainer.model.span} is not finite: go back to a snapshot")
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left)
        new = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self._folder))
        write_tensors(new / BLOCKS, tensors)
        write_tensors(new / _STATE, trainer.state())
        (new / _FACTS).write_text(json.dumps({"optimizer": trainer.optimizer, "step": trainer.step}))
        last = self.newest()
        number = last.number + 1 if last else 1
        snapshot = Snapshot(self._folder / f"{number:06}-step-{trainer.step}", number, trainer.step)
        digests = block_digests(new / BLOCKS, trainer.model.family.layers)
        new.rename(snapshot.folder)
        _sync(self._folder)
        for old in self.all()[:-KEPT]:
            shutil.rmtree(old.folder)
        return snapshot, digests

    def load(self, snapshot: Snapshot, trainer: SpanTrainer) -> None:
        """Put a trainer where the snapshot was made. Another optimizer begins without a state. Raises CheckpointError,
        also if the files are damaged.
        """
        facts = read_json(snapshot.folder / _FACTS)
        with SafetensorsFile(snapshot.blocks) as file:
            tensors = {name: file.read(name) for name in file.tensors}
        state = {}
        if facts.get("optimizer") == trainer.optimizer:
            with SafetensorsFile(snapshot.folder / _STATE) as file:
                state = {name: file.read(name) for name in file.tensors}
        try:
            trainer.restore(snapshot.step, tensors, state)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{snapshot.folder}: is a snapshot of other blocks: {error}") from None


def _sync(folder: Path) -> None:
    """Have the folder's entries on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

"""Opens copies of our spans for the clients that may train them, and serves what they trained as another model.

What others are served never changes: a copy is trained beside the span, from the published weights on, and each client
has its own.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import trio

from peerd.compute.checkpoint.trained import BLOCKS, Description, base_of
from peerd.compute.device.free_memory import free_memory, give_back_memory
from peerd.compute.device.sizes import format_size
from peerd.compute.engine.capacity import block_bytes
from peerd.compute.errors import CheckpointError
from peerd.compute.model.span_model import load_span
from peerd.compute.training.memory import PassMemory
from peerd.compute.training.snapshots import Snapshot, Snapshots
from peerd.compute.training.span_trainer import COPIES, Optimizer, SpanTrainer
from peerd.protocol.errors import (
    Draining,
    InternalError,
    InvalidRequest,
    NoRoom,
    NotServed,
    Overloaded,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.span_training import MAX_SNAPSHOTS, MAX_TRAINED_BLOCKS, SpanBegin
from peerd.protocol.span import Span
from peerd.spans.budget import pass_bytes_of
from peerd.spans.slots import Slot, Slots
from peerd.spans.spec import AUTO, ServeSpec, Trainable

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.server.engine_task import EngineTask

log = logging.getLogger(__name__)

T = TypeVar("T")

Serve = Callable[[ServeSpec], Awaitable[object]]
Withdraw = Callable[[Slot], Awaitable[None]]


class TrainableSpans:
    """The copies of one peer's spans. One client at a time trains a copy of a span."""

    def __init__(self, slots: Slots, serve: Serve, withdraw: Withdraw) -> None:
        self._slots = slots
        self._serve = serve
        self._withdraw = withdraw
        self._busy: set[Slot] = set()

    @asynccontextmanager
    async def open(self, peer: PeerId, begin: SpanBegin) -> AsyncIterator[OpenCopy]:
        """A client's copy, until the block ends. Raises NotServed, UnsupportedFeature, Overloaded, InvalidRequest."""
        span = Span(begin.start, begin.end) if begin.start < begin.end else None
        slot, trainable = self._find(peer, begin.model, span)
        assert span is not None
        if slot in self._busy:
            raise Overloaded("a copy of these blocks is being trained now")
        self._busy.add(slot)
        try:
            served = slot.served
            assert slot.loader is not None
            assert served is not None
            folder = trainable.folder / peer / f"{begin.model.hex()[:16]}-{span.start}-{span.end}"
            spec = slot.loader.spec
            async with slot.loader.open() as checkpoint:
                snapshots = Snapshots(folder)
                load = _Loading(spec, checkpoint, span, begin, snapshots)
                trainer = await trio.to_thread.run_sync(load.run)
                if slot.served is not served:
                    raise Draining("these blocks left while the copy was loaded")
                yield OpenCopy(
                    trainer,
                    served.span,
                    served.task,
                    served.max_length,
                    trainable,
                    folder,
                    snapshots,
                    Description(base_of(checkpoint), begin.model, {}),
                    spec,
                    self,
                )
        except CheckpointError as error:
            raise InternalError(f"the copy cannot be loaded here: {error}") from None
        finally:
            self._busy.discard(slot)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(give_back_memory, "cpu")

    def _find(self, peer: PeerId, model: bytes, span: Span | None) -> tuple[Slot, Trainable]:
        for slot in self._slots:
            served, loader = slot.served, slot.loader
            if served is None or loader is None or served.model != model or span is None:
                continue
            if not served.span.start <= span.start < span.end <= served.span.end:
                continue
            if len(span) > MAX_TRAINED_BLOCKS:
                raise InvalidRequest(f"{len(span)} blocks: at most {MAX_TRAINED_BLOCKS} can be trained at once")
            trainable = loader.spec.trainable
            if trainable is None or peer not in trainable.peers:
                raise UnsupportedFeature(
                    f"this peer lets only those train its blocks whom its operator names (--trainable {peer})"
                )
            if served.task.health.broken:
                raise Draining("the device of these blocks has failed")
            return slot, trainable
        raise NotServed(f"blocks {span} of that model are not served here")

    async def publish(self, copy: OpenCopy, description: Description) -> bytes:
        """Serve a copy's newest snapshot as a part of the described model, instead of what was published of it."""
        digest = description.model_digest
        folder = copy.folder / f"published-{digest.hex()[:16]}"
        before = self._published(copy.folder)
        if any(slot.served is not None and slot.served.model == digest for slot in before):
            return digest
        await _writing("trained blocks", _lay_out, folder, description, copy.newest)
        span = _around(copy.trainer.model.span, copy.served, description)
        spec = replace(
            copy.spec,
            model=folder,
            revision=None,
            blocks=span,
            stay=True,
            adapters=(),
            trainable=None,
            engine=AUTO,
            head=False,
        )
        try:
            await self._serve(spec)
            log.info("serving blocks %s that were trained in %d steps, as %s", span, copy.trainer.step, folder)
        finally:
            # Also if the client has gone meanwhile: two would be announced for ever.
            if any(slot not in before for slot in self._published(copy.folder)):
                with trio.CancelScope(shield=True):
                    await self._replace(before, folder)
        return digest

    def _published(self, folder: Path) -> list[Slot]:
        """The slots with what was published of the copy in this folder. They may be loading again now."""
        return [slot for slot in self._slots if slot.loader is not None and _is_in(slot.loader.spec.model, folder)]

    async def _replace(self, before: list[Slot], folder: Path) -> None:
        for slot in before:
            await self._withdraw(slot)
        for old in folder.parent.glob("published-*"):
            if old != folder:
                await trio.to_thread.run_sync(partial(shutil.rmtree, old, ignore_errors=True))


@dataclass(slots=True, eq=False)
class OpenCopy:
    """A client's copy of a part of the `served` span, in training.

    folder: holds its snapshots. base: describes what it began from.
    """

    trainer: SpanTrainer
    served: Span
    task: EngineTask
    max_length: int
    trainable: Trainable
    folder: Path
    snapshots: Snapshots
    base: Description
    spec: ServeSpec
    owner: TrainableSpans
    newest: Snapshot | None = None
    digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def max_steps(self) -> int:
        return self.trainable.max_steps

    @property
    def max_rate(self) -> float:
        return self.trainable.max_rate

    @property
    def saved(self) -> tuple[int, ...]:
        return tuple(sorted({snapshot.step for snapshot in self.snapshots.all()}))[-MAX_SNAPSHOTS:]

    async def save(self) -> tuple[bytes, ...]:
        """Write a snapshot. Raises NonFiniteError, NoRoom."""
        with trio.CancelScope(shield=True):
            self.newest, self.digests = await _writing("the snapshot", self.snapshots.write, self.trainer)
        return tuple(self.digests.values())

    async def publish(self, blocks: Mapping[int, bytes]) -> bytes:
        """Serve the snapshot in the model with these blocks. Raises InvalidRequest, CheckpointError."""
        span = self.trainer.model.span
        own = {block: digest for block, digest in blocks.items() if span.start <= block < span.end}
        if own and (self.newest is None or self.newest.step != self.trainer.step):
            raise InvalidRequest("save first: a snapshot is published")
        if not blocks or (own and own != self.digests):
            raise InvalidRequest("these are not the digests of the blocks that were saved here")
        return await self.owner.publish(self, replace(self.base, blocks=dict(blocks)))


@dataclass(frozen=True, slots=True)
class _Loading:
    """Reads a copy in fp32: the published blocks, or what a snapshot has in their slot. Blocks the thread."""

    spec: ServeSpec
    checkpoint: Checkpoint
    span: Span
    begin: SpanBegin
    snapshots: Snapshots

    def run(self) -> SpanTrainer:
        """Raises CheckpointError, NoRoom, InvalidRequest."""
        snapshot = self._snapshot()
        needed = len(self.span) * block_bytes(self.checkpoint, torch.float32) * COPIES[self.begin.optimizer]
        passes = pass_bytes_of(self.spec)
        free = free_memory(self.spec.device)
        if needed + passes > free:
            raise NoRoom(
                f"training blocks {self.span} with {self.begin.optimizer} takes {format_size(needed + passes)},"
                f" {format_size(free)} are free: train fewer blocks, or with sgd"
            )
        model = load_span(self.checkpoint, self.span, device=self.spec.device, dtype=torch.float32)
        optimizer = cast(Optimizer, self.begin.optimizer)
        trainer = SpanTrainer(model, optimizer, self.begin.decay, PassMemory(passes))
        if snapshot is not None:
            self.snapshots.load(snapshot, trainer)
        return trainer

    def _snapshot(self) -> Snapshot | None:
        step = self.begin.step
        if step == 0:
            return None
        found = self.snapshots.newest(step)
        if step is not None and found is None:
            there = ", ".join(str(each.step) for each in self.snapshots.all()) or "none"
            raise InvalidRequest(f"there is no snapshot of step {step} here; there is {there}, and 0 for none of them")
        return found


async def _writing(what: str, write: Callable[..., T], *arguments: object) -> T:
    """Write files in a worker thread. Raises NoRoom where the disk does not take them: that is nobody's mistake."""
    try:
        return await trio.to_thread.run_sync(write, *arguments)
    except OSError as error:
        raise NoRoom(f"{what} cannot be written here: {error.strerror or error}") from None


def _is_in(model: str | Path, folder: Path) -> bool:
    return isinstance(model, Path) and model.parent == folder


def _around(trained: Span, served: Span, description: Description) -> Span:
    """The most of a served span that we can serve of a trained model: others have the weights that they trained."""
    before = [block + 1 for block in description.blocks if block < trained.start]
    behind = [block for block in description.blocks if block >= trained.end]
    return Span(max([served.start, *before]), min([served.end, *behind]))


def _lay_out(folder: Path, description: Description, snapshot: Snapshot | None) -> None:
    """Make a trained model's folder with the snapshot's weights."""
    description.write(folder)
    if snapshot is None:
        return
    with suppress(FileNotFoundError):
        (folder / BLOCKS).unlink()
    try:
        os.link(snapshot.blocks, folder / BLOCKS)
    except OSError:
        # Some file systems have no second names for a file.
        shutil.copyfile(snapshot.blocks, folder / BLOCKS)

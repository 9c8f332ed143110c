"""One client that trains a copy of our own blocks: answers the requests of its stream, one after the other.

What the client has not saved ends with the stream. A request that fails changes nothing and leaves the stream as it is;
a mistake in the protocol ends it (spec/training/span-training.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import trio

from peerd.compute.errors import CheckpointError
from peerd.compute.training.pass_input import PassInput
from peerd.compute.training.passes import Tape
from peerd.compute.training.span_trainer import SpanTrainer
from peerd.exchange.tensor_parts import receive_parts, send_parts
from peerd.net.connections import Stream
from peerd.net.limits.owners import Owner
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import (
    BadResult,
    ContextTooLong,
    Evicted,
    InvalidRequest,
    NoRoom,
    Overloaded,
)
from peerd.protocol.messages.span_training import (
    REQUESTS,
    Publish,
    Published,
    Request,
    Save,
    Saved,
    SpanBegun,
    SpanFailure,
    Updated,
    UpdateWeights,
    joined,
    parted,
)
from peerd.protocol.messages.training import MAX_PASS_POSITIONS, Backward, Forward, PassGradients, Result
from peerd.server.device_queue import Work
from peerd.server.engine_task import EngineTask
from peerd.server.training.lane import IDLE_S, REQUEST_DEADLINE_S
from peerd.server.wire_errors import wire_errors

# How many forwards may wait for their backwards.
MAX_TAPES = 256


class Copy(Protocol):
    """A client's copy of a span, in training."""

    @property
    def trainer(self) -> SpanTrainer: ...

    @property
    def task(self) -> EngineTask:
        """Computes the span itself, and beside inference also what trains the copy."""

    @property
    def max_length(self) -> int: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def max_rate(self) -> float: ...

    @property
    def saved(self) -> tuple[int, ...]:
        """The steps of the snapshots that there are."""

    async def save(self) -> tuple[bytes, ...]:
        """Write a snapshot; returns the digests of its blocks."""

    async def publish(self, blocks: Mapping[int, bytes]) -> bytes:
        """Serve the newest snapshot in the model whose blocks have these digests; returns that model's."""


@dataclass(slots=True, eq=False)
class SpanTraining:
    """One client's requests for its copy, in order."""

    stream: Stream
    owner: Owner
    copy: Copy
    tapes: dict[int, Tape] = field(default_factory=dict)

    @property
    def task(self) -> EngineTask:
        return self.copy.task

    @property
    def trainer(self) -> SpanTrainer:
        return self.copy.trainer

    async def run(self) -> None:
        """Answer requests until the client ends the stream. Raises the error that ended it."""
        if not self.trainer.passes.measured:
            await self.task.run_blocking(self.trainer.passes.measure)
        copy = self.copy
        begun = SpanBegun(self.trainer.step, copy.max_steps, copy.max_rate, MAX_PASS_POSITIONS, copy.saved)
        await self.stream.send(begun.to_header())
        while True:
            message = parse(await self._next_header(), REQUESTS)
            with trio.move_on_after(REQUEST_DEADLINE_S) as deadline:
                hidden, grad = await self._receive_tensors(message)
            if deadline.cancelled_caught:
                raise Evicted(f"a request took more than {REQUEST_DEADLINE_S:g} s to arrive")
            await self._answer(message, hidden, grad)

    def drop_all(self) -> None:
        """Free the memory of forwards without a backward."""
        for seq in list(self.tapes):
            self._take_tape(seq)

    async def _next_header(self) -> Mapping[str, object]:
        with trio.move_on_after(IDLE_S):
            return (await self.stream.receive()).header
        raise Evicted(f"no request for {IDLE_S:g} s: what was saved can be continued")

    async def _receive_tensors(self, message: Request) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not isinstance(message, Forward | Backward):
            return None, None
        rows = message.rows
        if not rows or (len(rows) > 1 and sum(rows) > MAX_PASS_POSITIONS):
            raise InvalidRequest(f"{sum(rows)} positions in one request: 1 to {MAX_PASS_POSITIONS}, or one row")
        if max(rows) > self.copy.max_length:
            raise ContextTooLong(f"a row of {max(rows)} positions: this model takes {self.copy.max_length}")
        shape = (sum(rows), self.trainer.model.hidden_size)
        hidden = grad = None
        if isinstance(message, Forward) or message.of is None:
            hidden = await receive_parts(self.stream, shape)
        if isinstance(message, Backward):
            grad = await receive_parts(self.stream, shape)
        return hidden, grad

    async def _answer(self, message: Request, hidden: torch.Tensor | None, grad: torch.Tensor | None) -> None:
        try:
            with wire_errors():
                match message:
                    case Forward():
                        assert hidden is not None
                        await self._forward(message, hidden)
                    case Backward():
                        assert grad is not None
                        await self._backward(message, hidden, grad)
                    case UpdateWeights():
                        await self._update(message)
                    case Save():
                        digests = await self.copy.save()
                        await self.stream.send(Saved(message.seq, self.trainer.step, joined(digests)).to_header())
                    case Publish():
                        model = await self.copy.publish(_digests_of(message))
                        await self.stream.send(Published(message.seq, model).to_header())
        except (BadResult, InvalidRequest, NoRoom, Overloaded) as error:
            await self.stream.send(SpanFailure.of(error, message.seq).to_header())
        except CheckpointError as error:
            await self.stream.send(SpanFailure.of(InvalidRequest(str(error)), message.seq).to_header())

    async def _forward(self, message: Forward, hidden: torch.Tensor) -> None:
        passes = self.trainer.passes
        given = PassInput(self.trainer.model.span, message.rows, hidden)
        micros = passes.plan(given)
        least, most = passes.tape_bytes(given, micros)
        free = passes.memory.next_tape_bytes if message.keep and len(self.tapes) < MAX_TAPES else 0
        work = passes.forward(given, micros, min(free, most) if free >= least else 0)
        await self._run(work)
        if work.tape is not None:
            self._drop(message.seq)
            self._keep(message.seq, work.tape)
        await self.stream.send(Result(message.seq, kept=work.tape is not None).to_header())
        await self._send(work.output)

    async def _backward(self, message: Backward, hidden: torch.Tensor | None, grad: torch.Tensor) -> None:
        passes = self.trainer.passes
        if message.of is not None:
            if message.of not in self.tapes or self.tapes[message.of].given.rows != message.rows:
                raise InvalidRequest(f"no forward {message.of} of these rows is kept: send its input too")
            tape = self._take_tape(message.of)
        else:
            assert hidden is not None
            given = PassInput(self.trainer.model.span, message.rows, hidden)
            tape = Tape(given, passes.plan(given), passes.leaves(given))
        work = self.trainer.backward(tape, grad)
        try:
            await self._run(work)
        except Overloaded:
            if message.of is not None:
                # It was never begun, so the client may ask again.
                self._keep(message.of, tape)
            raise
        await self.stream.send(PassGradients(message.seq).to_header())
        await self._send(work.grad)

    async def _update(self, message: UpdateWeights) -> None:
        copy, step = self.copy, self.trainer.step
        if message.rate > copy.max_rate:
            raise InvalidRequest(f"a learning rate of {message.rate:g}: this peer allows {copy.max_rate:g} at most")
        if step >= copy.max_steps:
            raise InvalidRequest(f"step {step + 1}: this peer allows {copy.max_steps} steps from the published weights")
        # Tapes hold the weights of before.
        self.drop_all()
        work = self.trainer.update(message.rate, message.clip)
        with trio.CancelScope(shield=True):
            # A step that is half taken would be of no use to anybody.
            try:
                await self._run(work)
            except NoRoom:
                raise Evicted("there is no memory for a step now: begin again from the last snapshot") from None
        await self.stream.send(Updated(message.seq, self.trainer.step, work.norm).to_header())

    async def _run(self, work: Work) -> None:
        await self.task.run_work(self.owner.share, work)

    async def _send(self, tensor: torch.Tensor) -> None:
        await send_parts(self.stream, tensor, codec="exact", dtype=torch.float32)

    def _keep(self, seq: int, tape: Tape) -> None:
        self.trainer.passes.memory.take(self.owner.share, tape.size_bytes)
        self.tapes[seq] = tape

    def _take_tape(self, seq: int) -> Tape:
        tape = self.tapes.pop(seq)
        self.trainer.passes.memory.take(self.owner.share, -tape.size_bytes)
        return tape

    def _drop(self, seq: int) -> None:
        if seq in self.tapes:
            self._take_tape(seq)


def _digests_of(message: Publish) -> dict[int, bytes]:
    digests = parted(message.digests)
    if len(digests) != len(message.blocks) or list(message.blocks) != sorted(set(message.blocks)):
        raise InvalidRequest("a trained model's blocks are ascending, each with a digest")
    return dict(zip(message.blocks, digests, strict=True))

"""One lane of training passes: reads a client's requests, has them run below inference, and answers them in order.

Everything that the client holds here (parameters, requests, tapes) is freed with the lane. A client may go away in the
middle. So its lane is read all the time, which shows its end at once, and its work is then removed from the device's
queue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trio

from peerd.compute.training.pass_input import PassInput
from peerd.compute.training.passes import PassRunner, Tape
from peerd.compute.training.tunables import Tunables
from peerd.exchange.tensor_parts import receive_parts, send_parts
from peerd.net.connections import Stream
from peerd.net.limits.owners import Owner
from peerd.protocol.encoding.schema import parse
from peerd.protocol.encoding.tensors import DTYPES, MAX_EXACT_VALUE_BYTES
from peerd.protocol.errors import ContextTooLong, Evicted, InvalidRequest, RemoteProtocolError
from peerd.protocol.messages.training import (
    MAX_PASS_POSITIONS,
    MAX_REQUESTS,
    Backward,
    Begin,
    Begun,
    Forward,
    Parameter,
    PassGradients,
    Result,
)
from peerd.protocol.span import Span
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import HostQuota
from peerd.server.wire_errors import wire_errors
from peerd.trio_tools import open_tasks

# What a parameter takes beside its values: the objects of its tensors, on the host and the device, and of its gradient.
PARAMETER_BYTES = 2048
# A lane that sends nothing for this long gives its tapes to others, as a session gives its pages.
IDLE_S = 300.0
# A request of 4096 positions of width 8192 takes half a minute on a slow line of 50 Mbit/s.
REQUEST_DEADLINE_S = 600.0
_REQUESTS: tuple[type[Forward | Backward], ...] = (Forward, Backward)


@dataclass(frozen=True, slots=True)
class PassSpan:
    """The engine that runs a lane's passes. `max_length`: the positions that a row may have."""

    max_length: int
    task: EngineTask
    passes: PassRunner


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """A request that has arrived completely. `hidden` is None if a tape has it; `grad` is None in a forward.

    `size_bytes` is its part of the quota.
    """

    message: Forward | Backward
    hidden: torch.Tensor | None
    grad: torch.Tensor | None
    size_bytes: int


class Lane:
    """One client's lane over one span's blocks: it reads requests, and answers them in order."""

    def __init__(self, stream: Stream, owner: Owner, begin: Begin, found: PassSpan, quota: HostQuota) -> None:
        self._stream = stream
        self.owner = owner
        self._begin = begin
        self._blocks = Span(begin.start, begin.end)
        self._found = found
        self._passes = found.passes
        self._tunables = Tunables()
        self._quota = quota
        # The part of the quota that this lane holds.
        self._held_bytes = 0
        self._unanswered = 0
        self._tapes: dict[int, tuple[Tape, int]] = {}
        self._width = found.passes.whole.hidden_size
        self._dtype = DTYPES[begin.dtype]

    @property
    def task(self) -> EngineTask:
        """The task of the engine that it uses."""
        return self._found.task

    async def run(self) -> None:
        """Answer requests until the client ends the lane. Raises the error that ended it."""
        begin = self._begin
        with wire_errors():
            self._passes.limits.check_count(self._blocks, begin.parameters)
        # Twice: the received tensors and their copies on the device.
        self._hold(2 * begin.values * MAX_EXACT_VALUE_BYTES + begin.parameters * PARAMETER_BYTES)
        self._tunables = await self._receive_parameters()
        if not self._passes.measured:
            await self._found.task.run_blocking(self._passes.measure)
        begun = Begun(max_positions=MAX_PASS_POSITIONS, max_requests=MAX_REQUESTS)
        await self._stream.send(begun.to_header())
        arrived, requests = trio.open_memory_channel[_Request](MAX_REQUESTS)
        async with open_tasks() as tasks:
            tasks.start_soon(self._answer_all, requests)
            await self._read(arrived)

    def drop_all(self) -> None:
        """Give back everything that the lane holds."""
        for seq in list(self._tapes):
            self._drop(seq)
        self._quota.give(self.owner, self._held_bytes)
        self._held_bytes = 0

    def _hold(self, size_bytes: int) -> None:
        self._quota.take(self.owner, size_bytes)
        self._held_bytes += size_bytes

    # Reading.

    async def _read(self, arrived: trio.MemorySendChannel[_Request]) -> None:
        """Read requests as long as the client sends them, also while others are computed, to notice the lane's end."""
        while True:
            message = parse(await self._next_header(), _REQUESTS)
            self._check(message)
            if self._unanswered >= MAX_REQUESTS:
                raise RemoteProtocolError(f"more than {MAX_REQUESTS} requests of a lane unanswered")
            self._unanswered += 1
            # At most two tensors in and one out.
            size_bytes = 3 * sum(message.rows) * self._width * MAX_EXACT_VALUE_BYTES
            self._hold(size_bytes)
            with trio.move_on_after(REQUEST_DEADLINE_S) as deadline:
                request = await self._receive_tensors(message, size_bytes)
            if deadline.cancelled_caught:
                raise Evicted(f"a request took more than {REQUEST_DEADLINE_S:g} s to arrive")
            await arrived.send(request)

    async def _next_header(self) -> dict[str, Any]:
        """The next message's header. Raises Evicted if nothing comes and nothing is computed for IDLE_S."""
        while True:
            with trio.move_on_after(IDLE_S):
                return (await self._stream.receive()).header
            if not self._unanswered:
                raise Evicted(f"a lane idle for {IDLE_S:g} s")

    async def _receive_parameters(self) -> Tunables:
        """Receive deep prompts and LoRA tensors. Raises RemoteProtocolError if they contradict `begin`."""
        tensors: dict[tuple[int, str], torch.Tensor] = {}
        left = self._begin.values
        for _ in range(self._begin.parameters):
            parameter = parse(await self._next_header(), (Parameter,))
            left -= math.prod(parameter.shape)
            if left < 0 or len(parameter.shape) < 2:
                raise RemoteProtocolError(
                    f"{parameter.name} of shape {parameter.shape} is not among the {self._begin.values} values"
                    " announced"
                )
            with wire_errors():
                self._passes.limits.check_parameter(self._blocks, parameter.block, parameter.name, parameter.shape)
            if (parameter.block, parameter.name) in tensors:
                raise InvalidRequest(f"{parameter.name} of block {parameter.block} came twice")
            tensors[parameter.block, parameter.name] = (await receive_parts(self._stream, parameter.shape)).float()
        return Tunables(tensors)

    async def _receive_tensors(self, message: Forward | Backward, size_bytes: int) -> _Request:
        shape = (sum(message.rows), self._width)
        hidden = grad = None
        if isinstance(message, Forward) or message.of is None:
            hidden = await receive_parts(self._stream, shape)
        if isinstance(message, Backward):
            grad = await receive_parts(self._stream, shape)
        return _Request(message, hidden, grad, size_bytes)

    def _check(self, message: Forward | Backward) -> None:
        """Refuse a request that cannot be served before its tensors come. Raises InvalidRequest, ContextTooLong."""
        rows = message.rows
        if message.seq in self._tapes:
            raise RemoteProtocolError(f"two requests with the number {message.seq}")
        if not rows:
            raise InvalidRequest("a pass without rows")
        if max(rows) > self._found.max_length:
            raise ContextTooLong(f"a row of {max(rows)} positions: this model takes {self._found.max_length}")
        if len(rows) > 1 and sum(rows) > MAX_PASS_POSITIONS:
            raise InvalidRequest(f"{sum(rows)} positions in one request: at most {MAX_PASS_POSITIONS}, or one row")

    # Answering.

    async def _answer_all(self, requests: trio.MemoryReceiveChannel[_Request]) -> None:
        async for request in requests:
            with wire_errors(), self._found.task.health.noting_bad_results():
                if isinstance(request.message, Forward):
                    await self._answer_forward(request.message, request)
                else:
                    await self._answer_backward(request.message, request)
            self._unanswered -= 1
            self._quota.give(self.owner, request.size_bytes)
            self._held_bytes -= request.size_bytes

    async def _answer_forward(self, message: Forward, request: _Request) -> None:
        assert request.hidden is not None
        given = PassInput(self._blocks, message.rows, request.hidden, self._tunables, self._begin.adapter)
        micros = self._passes.plan(given)
        with self._tape_room(message, self._passes.tape_bytes(given, micros)) as allowed:
            work = self._passes.forward(given, micros, allowed)
            await self._found.task.run_work(self.owner.share, work)
        if work.tape is not None:
            self._passes.memory.take(self.owner.share, work.tape.size_bytes)
            self._tapes[message.seq] = work.tape, work.tape.size_bytes
        await self._stream.send(Result(message.seq, kept=work.tape is not None).to_header())
        await self._send(work.output)

    @contextmanager
    def _tape_room(self, message: Forward, sizes: tuple[int, int]) -> Iterator[int]:
        """Reserve memory for a tape while its forward runs. Yields how many bytes it may take."""
        least, most = sizes
        memory, owner = self._passes.memory, self.owner.share
        free = memory.next_tape_bytes if message.keep else 0
        allowed = min(free, most) if free >= least else 0
        memory.take(owner, allowed)
        try:
            yield allowed
        finally:
            memory.take(owner, -allowed)

    async def _answer_backward(self, message: Backward, request: _Request) -> None:
        assert request.grad is not None
        if message.of is not None:
            tape = self._take_tape(message.of, message.rows)
            work = self._passes.backward_of(tape, request.grad)
        else:
            assert request.hidden is not None
            given = PassInput(self._blocks, message.rows, request.hidden, self._tunables, self._begin.adapter)
            work = self._passes.backward(given, self._passes.plan(given), request.grad)
        try:
            await self._found.task.run_work(self.owner.share, work)
        finally:
            if message.of is not None:
                self._drop(message.of)
        await self._stream.send(PassGradients(message.seq, len(work.gradients)).to_header())
        await self._send(work.grad)
        for (block, name), gradient in work.gradients.items():
            await self._stream.send(Parameter(block, name, tuple(gradient.shape)).to_header())
            # An optimizer sums gradients over thousands of steps, so they are not rounded on their way.
            await send_parts(self._stream, gradient, codec="exact", dtype=torch.float32)

    async def _send(self, tensor: torch.Tensor) -> None:
        await send_parts(self._stream, tensor, codec=self._begin.codec, dtype=self._dtype)

    def _take_tape(self, seq: int, rows: Sequence[int]) -> Tape:
        tape, _ = self._tapes.get(seq, (None, 0))
        if tape is None or tape.given.rows != tuple(rows):
            raise RemoteProtocolError(f"no forward {seq} of these rows is kept on this lane")
        return tape

    def _drop(self, seq: int) -> None:
        _, size_bytes = self._tapes.pop(seq)
        self._passes.memory.take(self.owner.share, -size_bytes)

"""A client's lane to one hop: training passes over its blocks, several requests at a time (spec/training/training.md).

Answers come in the order of the requests, so each request waits for its turn to read. A hop may refuse while the client
still sends, so a request reads and sends at the same time. A request that fails, or is cancelled half-way, ends the
lane for all requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import trio

from peerd.compute.adapters.lora import PREFIX_K, PREFIX_V
from peerd.exchange.tensor_parts import receive_parts, send_parts
from peerd.net.connections import Connections, Stream
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.encoding.tensors import DTYPES
from peerd.protocol.errors import (
    ConnectionLost,
    PeerdError,
    RemoteProtocolError,
    StreamReset,
    Unresponsive,
    UnsupportedFeature,
)
from peerd.protocol.messages.training import (
    PASS_PROTOCOL,
    PREFIXES,
    Backward,
    Begin,
    Begun,
    Forward,
    Parameter,
    PassFailure,
    PassGradients,
    Result,
)
from peerd.routing.chains.chain import Hop
from peerd.trio_tools import open_tasks

# For dialling and the handshake on a slow line. Sending the parameters has no deadline.
OPEN_DEADLINE_S = 15.0
# A pass has lower priority than inference, and may wait long for its turn. After a longer silence the hop must have
# lost the request: pings only show that the peer lives.
ANSWER_DEADLINE_S = 600.0

T = TypeVar("T")
M = TypeVar("M", Result, PassGradients)
Parameters = Mapping[tuple[int, str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LaneTerms:
    """What a lane is for. `parameters`: tensors by (block, name); those of a hop's blocks are sent to it."""

    model: bytes
    dtype: str
    codec: str
    adapter: str
    parameters: Parameters


@dataclass(frozen=True, slots=True, eq=False)
class ForwardAnswer:
    """A hop's output. `kept` is the number to name in the backward if the hop kept a tape, else None."""

    output: torch.Tensor
    kept: int | None


@dataclass(frozen=True, slots=True, eq=False)
class BackwardAnswer:
    """The gradient of the input, and those of the parameters of the hop's blocks."""

    grad: torch.Tensor
    gradients: dict[tuple[int, str], torch.Tensor]


class TrainingLane:
    """One hop's lane. Requests raise the hop's errors and failures; then the lane is `broken`.

    `width` is that of the hidden states. Made by `open_lane`.
    """

    def __init__(self, hop: Hop, stream: Stream, terms: LaneTerms, begun: Begun, width: int) -> None:
        self.hop = hop
        self.begun = begun
        self.broken: PeerdError | None = None
        self._stream = stream
        self._terms = terms
        self._width = width
        self._window = trio.CapacityLimiter(begun.max_requests)
        self._sending = trio.Lock()
        self._turns: deque[trio.Event] = deque()
        self._seq = 0

    def __repr__(self) -> str:
        return f"<TrainingLane {self.hop.span} to {self.hop.peer_id}{' broken' if self.broken else ''}>"

    def close(self) -> None:
        """End the lane; the hop then frees everything that it kept for us."""
        self._break(ConnectionLost("the lane was closed"))

    async def forward(self, rows: tuple[int, ...], hidden: torch.Tensor, *, keep: bool) -> ForwardAnswer:
        """Run `[sum of rows, width]`. Raises the error with which the hop refuses, or a PeerFault."""
        shape = (sum(rows), self._width)

        async def read(seq: int) -> ForwardAnswer:
            reply = await self._hear(Result, seq)
            return ForwardAnswer(await receive_parts(self._stream, shape), seq if reply.kept else None)

        return await self._ask(lambda seq: Forward(seq, rows, keep), (hidden,), read)

    async def backward(
        self, rows: tuple[int, ...], hidden: torch.Tensor, kept: int | None, grad: torch.Tensor
    ) -> BackwardAnswer:
        """The backward of rows whose input was `hidden`, from the tape `kept` if the hop has one. Raises as
        `forward`.
        """

        async def read(seq: int) -> BackwardAnswer:
            reply = await self._hear(PassGradients, seq)
            back = await receive_parts(self._stream, grad.shape)
            return BackwardAnswer(back, await self._read_gradients(reply.parameters))

        tensors = (hidden, grad) if kept is None else (grad,)
        return await self._ask(lambda seq: Backward(seq, rows, kept), tensors, read)

    async def _ask(
        self, request: Callable[[int], Message], tensors: Sequence[torch.Tensor], read: Callable[[int], Awaitable[T]]
    ) -> T:
        async with self._window:
            if self.broken is not None:
                raise self.broken
            turn = trio.Event()
            try:
                async with open_tasks() as tasks:
                    seq: int = await tasks.start(self._send, request, tensors, turn)
                    await turn.wait()
                    if self.broken is not None:
                        raise self.broken
                    answer = await read(seq)
            except PeerdError as error:
                self._break(error)
                raise
            except (trio.EndOfChannel, trio.ClosedResourceError):
                raise self._break(ConnectionLost(f"{self.hop.peer_id} ended the lane")) from None
            except BaseException:
                # If cancelled, the rest of this answer would be taken for the next one.
                self.close()
                raise
            self._turns.popleft()
            if self._turns:
                self._turns[0].set()
            return answer

    async def _send(
        self,
        request: Callable[[int], Message],
        tensors: Sequence[torch.Tensor],
        turn: trio.Event,
        *,
        task_status: trio.TaskStatus[int],
    ) -> None:
        async with self._sending:
            self._seq += 1
            self._turns.append(turn)
            if len(self._turns) == 1:
                turn.set()
            task_status.started(self._seq)
            # If the hop ended the lane, its last message has the reason: the task that reads gets it.
            with suppress(ConnectionLost, StreamReset, trio.ClosedResourceError):
                await self._stream.send(request(self._seq).to_header(), priority=Priority.BULK)
                for tensor in tensors:
                    await send_parts(self._stream, tensor, codec=self._terms.codec, dtype=DTYPES[self._terms.dtype])

    async def _hear(self, kind: type[M], seq: int) -> M:
        """The head of the answer to request `seq`."""
        with trio.move_on_after(ANSWER_DEADLINE_S):
            reply = parse((await self._stream.receive()).header, (kind, PassFailure))
            if isinstance(reply, PassFailure):
                raise reply.error
            assert isinstance(reply, kind)
            if reply.seq != seq:
                raise RemoteProtocolError(f"an answer to request {reply.seq} where {seq} was next")
            return reply
        raise Unresponsive(f"{self.hop.peer_id} computed nothing within {ANSWER_DEADLINE_S:g} s")

    async def _read_gradients(self, count: int) -> dict[tuple[int, str], torch.Tensor]:
        gradients: dict[tuple[int, str], torch.Tensor] = {}
        own = own_parameters(self._terms.parameters, self.hop)
        if count != len(own):
            raise RemoteProtocolError(f"{count} gradients of {len(own)} parameters")
        for _ in range(count):
            header = parse((await self._stream.receive()).header, (Parameter,))
            expected = own.get((header.block, header.name))
            if expected is None or tuple(expected.shape) != header.shape or (header.block, header.name) in gradients:
                raise RemoteProtocolError(f"a gradient of {header.name} in block {header.block}, shape {header.shape}")
            gradients[header.block, header.name] = await receive_parts(self._stream, header.shape)
        return gradients

    def _break(self, error: PeerdError) -> PeerdError:
        """End the lane. Returns the error that broke it first."""
        if self.broken is None:
            self.broken = error
            self._stream.reset("closed")
            for turn in self._turns:
                turn.set()
        return self.broken


def own_parameters(parameters: Parameters, hop: Hop) -> Parameters:
    """The parameters of the hop's blocks."""
    return {key: tensor for key, tensor in parameters.items() if hop.span.start <= key[0] < hop.span.end}


async def open_lane(connections: Connections, hop: Hop, terms: LaneTerms, width: int) -> TrainingLane:
    """Open a lane and send its parameters. Raises the error with which the hop refuses, or a PeerFault."""
    stream = await _open_stream(connections, hop)
    own = own_parameters(terms.parameters, hop)
    begin = Begin(
        model=terms.model,
        start=hop.span.start,
        end=hop.span.end,
        dtype=terms.dtype,
        codec=terms.codec,
        adapter=terms.adapter,
        parameters=len(own),
        values=sum(tensor.numel() for tensor in own.values()),
        # Hops of the first releases know no prefixes, and everything else that is sent.
        needs=(PREFIXES,) if any(name in (PREFIX_K, PREFIX_V) for _, name in own) else (),
    )
    try:
        async with open_tasks() as tasks:
            tasks.start_soon(_send_parameters, stream, begin, own)
            # This reads while we send, because a refusal does not wait for the last parameter.
            begun = await _hear_begun(stream, hop)
    except BaseException:
        stream.reset("cancelled")
        raise
    return TrainingLane(hop, stream, terms, begun, width)


async def _open_stream(connections: Connections, hop: Hop) -> Stream:
    with trio.move_on_after(OPEN_DEADLINE_S):
        return await connections.open_stream(
            hop.peer_id, PASS_PROTOCOL, addresses=hop.offer.addresses, priority=Priority.BULK
        )
    raise Unresponsive(f"{hop.peer_id} could not be reached within {OPEN_DEADLINE_S:g} s")


async def _send_parameters(stream: Stream, begin: Begin, parameters: Parameters) -> None:
    # As in a request, the task that reads gets the reason why the lane ended.
    with suppress(ConnectionLost, StreamReset, trio.ClosedResourceError):
        await stream.send(begin.to_header(), priority=Priority.BULK)
        for (block, name), tensor in parameters.items():
            header = Parameter(block, name, tuple(tensor.shape))
            await stream.send(header.to_header(), priority=Priority.BULK)
            await send_parts(stream, tensor, codec="exact", dtype=torch.float32)


async def _hear_begun(stream: Stream, hop: Hop) -> Begun:
    try:
        with trio.move_on_after(ANSWER_DEADLINE_S):
            reply = parse((await stream.receive()).header, (Begun, PassFailure))
            if isinstance(reply, PassFailure):
                raise reply.error
            assert isinstance(reply, Begun)
            return reply
    except trio.EndOfChannel:
        raise ConnectionLost(f"{hop.peer_id} ended the lane") from None
    except StreamReset as reset:
        if reset.reason == UnsupportedFeature.code:
            raise UnsupportedFeature(f"{hop.peer_id} does not train") from None
        raise reset.refusal from None
    raise Unresponsive(f"{hop.peer_id} did not begin within {ANSWER_DEADLINE_S:g} s")

"""A client's stream to a peer that lets it train a copy of its blocks (spec/training/span-training.md).

One request at a time. A request that the peer refuses raises its error and changes nothing; if the stream ends, what
was saved before can be continued on another one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import trio

from peerd.client.training.lane import ANSWER_DEADLINE_S, OPEN_DEADLINE_S
from peerd.client.training.rows import cut
from peerd.exchange.tensor_parts import receive_parts, send_parts
from peerd.net.connections import Connections, Stream
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import (
    ConnectionLost,
    NotServed,
    PeerdError,
    RemoteProtocolError,
    StreamReset,
    Unresponsive,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.span_training import (
    SPAN_PROTOCOL,
    Publish,
    Published,
    Save,
    Saved,
    SpanBegin,
    SpanBegun,
    SpanFailure,
    Updated,
    UpdateWeights,
    joined,
    parted,
)
from peerd.protocol.messages.training import Backward, Forward, PassGradients, Result
from peerd.protocol.span import Span
from peerd.routing.directory.offer import Offer
from peerd.trio_tools import open_tasks

# Loading a copy takes as long as loading the span, and a snapshot as long as the disk needs.
LOAD_DEADLINE_S = 1800.0

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True, eq=False)
class _ForwardPart:
    """The rows of one request. `kept`: the request whose input the peer has kept for the backward."""

    rows: tuple[int, ...]
    hidden: torch.Tensor
    kept: int | None


@dataclass(frozen=True, slots=True, eq=False)
class SpanForward:
    """A forward through the copy, of which each part was a request. The backward names them."""

    output: torch.Tensor
    parts: tuple[_ForwardPart, ...]


class SpanLane:
    """A copy of `span` on a peer. Every method raises the peer's error, or a PeerFault that ended the stream.

    step: how many steps the copy is away from the published weights. begun: the peer's limits.
    """

    def __init__(self, peer: PeerId, span: Span, width: int, stream: Stream, begun: SpanBegun) -> None:
        self.peer = peer
        self.span = span
        self.begun = begun
        self.step = begun.step
        self._width = width
        self._stream = stream
        self._seq = 0
        self._lock = trio.Lock()
        # Whether the peer has answered the last request, so that another one may follow.
        self._is_answered = True

    def __repr__(self) -> str:
        return f"<SpanLane {self.span} on {self.peer} step={self.step}>"

    async def forward(self, rows: Sequence[int], hidden: torch.Tensor, *, keep: bool = True) -> SpanForward:
        """Run packed rows, `[sum of rows, width]`, in as many requests as the peer's limit of positions needs."""
        outputs, parts = [], []
        for _, lengths, first in cut(rows, self.begun.max_positions):
            part = hidden[first : first + sum(lengths)]
            async with self._asking(Forward(self._next(), lengths, keep), part) as seq:
                reply = await self._hear(Result, seq)
                outputs.append(await receive_parts(self._stream, (sum(lengths), self._width)))
            parts.append(_ForwardPart(lengths, part, seq if reply.kept else None))
        return SpanForward(torch.cat(outputs), tuple(parts))

    async def backward(self, done: SpanForward, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the forward's input. The peer adds those of its weights to what it has."""
        grads = torch.split(grad, [len(part.hidden) for part in done.parts])
        return torch.cat([await self._back(part, each) for part, each in zip(done.parts, grads, strict=True)])

    async def _back(self, part: _ForwardPart, grad: torch.Tensor) -> torch.Tensor:
        tensors = (part.hidden, grad) if part.kept is None else (grad,)
        async with self._asking(Backward(self._next(), part.rows, part.kept), *tensors) as seq:
            await self._hear(PassGradients, seq)
            return await receive_parts(self._stream, tuple(grad.shape))

    async def update(self, rate: float, clip: float = 0.0) -> float:
        """Have the optimizer take a step; returns the norm of the gradients. `clip`: the largest norm; 0 for any."""
        async with self._asking(UpdateWeights(self._next(), rate, clip)) as seq:
            reply = await self._hear(Updated, seq)
        self.step = reply.step
        return reply.norm

    async def save(self) -> dict[int, bytes]:
        """Have a snapshot written; returns the digests of the span's blocks."""
        async with self._asking(Save(self._next())) as seq:
            digests = parted((await self._hear(Saved, seq, LOAD_DEADLINE_S)).digests)
        if len(digests) != len(self.span):
            raise RemoteProtocolError(f"{len(digests)} digests of {len(self.span)} blocks")
        return dict(zip(range(self.span.start, self.span.end), digests, strict=True))

    async def publish(self, blocks: Mapping[int, bytes]) -> bytes:
        """Have the snapshot served in the model whose trained blocks have these digests; returns that model's."""
        ordered = dict(sorted(blocks.items()))
        message = Publish(self._next(), tuple(ordered), joined(list(ordered.values())))
        async with self._asking(message) as seq:
            return (await self._hear(Published, seq, LOAD_DEADLINE_S)).model

    def close(self) -> None:
        """End the stream. The peer forgets what was not saved."""
        self._stream.reset("closed")

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    @asynccontextmanager
    async def _asking(self, request: Message, *tensors: torch.Tensor) -> AsyncIterator[int]:
        """Send a request while the body reads its answer: a peer may refuse before it has read everything.

        A request that is cancelled, or that fails otherwise than by the peer's word, ends the stream.
        """
        seq: int = request.seq  # type: ignore[attr-defined]
        async with self._lock:
            if not self._is_answered:
                raise ConnectionLost(f"the training on {self.peer} has ended: open it again")
            self._is_answered = False
            try:
                async with open_tasks() as tasks:
                    tasks.start_soon(self._send, request, tensors)
                    yield seq
                self._is_answered = True
            except (trio.EndOfChannel, trio.ClosedResourceError):
                raise ConnectionLost(f"{self.peer} ended the training") from None
            finally:
                if not self._is_answered:
                    # The rest of this answer would be taken for the next one.
                    self.close()

    async def _send(self, request: Message, tensors: Sequence[torch.Tensor]) -> None:
        with suppress(ConnectionLost, StreamReset, trio.ClosedResourceError):
            await self._stream.send(request.to_header(), priority=Priority.BULK)
            for tensor in tensors:
                await send_parts(self._stream, tensor, codec="exact", dtype=torch.float32)

    async def _hear(self, kind: type[M], seq: int, deadline_s: float = ANSWER_DEADLINE_S) -> M:
        with trio.move_on_after(deadline_s):
            reply = parse((await self._stream.receive()).header, (kind, SpanFailure))
            if isinstance(reply, SpanFailure):
                self._is_answered = reply.seq == seq
                raise reply.error
            assert isinstance(reply, kind)
            if reply.seq != seq:  # type: ignore[attr-defined]
                raise RemoteProtocolError(f"an answer to another request than {seq}")
            return reply
        raise Unresponsive(f"{self.peer} computed nothing within {deadline_s:g} s")


async def open_span_lane(connections: Connections, offers: Sequence[Offer], begin: SpanBegin, width: int) -> SpanLane:
    """Open a copy of these blocks on the first of the peers that lets us. Raises the last refusal, or NotServed."""
    span = Span(begin.start, begin.end)
    refusal: PeerdError = NotServed(f"no single peer serves blocks {span}: choose blocks that lie in one server's span")
    for offer in offers:
        if not offer.span.start <= span.start < span.end <= offer.span.end:
            continue
        try:
            return await _open(connections, offer, begin, width)
        except PeerdError as error:
            refusal = error
    raise refusal


async def _open(connections: Connections, offer: Offer, begin: SpanBegin, width: int) -> SpanLane:
    with trio.move_on_after(OPEN_DEADLINE_S) as scope:
        stream = await connections.open_stream(
            offer.peer_id, SPAN_PROTOCOL, addresses=offer.addresses, priority=Priority.BULK
        )
    if scope.cancelled_caught:
        raise Unresponsive(f"{offer.peer_id} could not be reached within {OPEN_DEADLINE_S:g} s")
    try:
        await stream.send(begin.to_header(), priority=Priority.BULK)
        with trio.move_on_after(LOAD_DEADLINE_S):
            reply = parse((await stream.receive()).header, (SpanBegun, SpanFailure))
            if isinstance(reply, SpanFailure):
                raise reply.error
            assert isinstance(reply, SpanBegun)
            return SpanLane(offer.peer_id, Span(begin.start, begin.end), width, stream, reply)
        raise Unresponsive(f"{offer.peer_id} loaded no copy within {LOAD_DEADLINE_S:g} s")
    except trio.EndOfChannel:
        raise ConnectionLost(f"{offer.peer_id} ended the training") from None
    except StreamReset as reset:
        if reset.reason == UnsupportedFeature.code:
            raise UnsupportedFeature(f"{offer.peer_id} trains no blocks of its own") from None
        raise
    except BaseException:
        stream.reset("cancelled")
        raise

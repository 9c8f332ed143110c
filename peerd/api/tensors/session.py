"""`/peerd/v1/session`: a session of tensors for a program on this machine, over a websocket.

Requests are answered in order, one at a time; a long step is cut into pieces for the swarm anyway. The session ends
with the websocket.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import trio
from starlette.websockets import WebSocket

from peerd.api.errors import ApiError
from peerd.api.tensors.adapters import OwnAdapter, gradient_messages, read_own_adapter
from peerd.api.tensors.bodies import decoded, header_of, tensor_of
from peerd.compute.errors import AdapterError
from peerd.local.messages import (
    FROM_CLIENT,
    MAX_WAITING,
    Embed,
    GradientsOutput,
    LocalBackward,
    LocalForward,
    LocalParameter,
    Logits,
    SessionOpened,
    message_bytes,
    read_message,
    read_open,
)
from peerd.protocol.encoding.schema import parse
from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.encoding.wire import RawMessage
from peerd.protocol.errors import InvalidRequest, PeerdError, RemoteProtocolError
from peerd.protocol.messages.session import Failure, Output, Step
from peerd.protocol.rows import RowSlice
from peerd.protocol.span import Span
from peerd.trio_tools import open_tasks

if TYPE_CHECKING:
    import torch

    from peerd.api.models import Models
    from peerd.client.model import SwarmModel
    from peerd.client.session.session import Session
    from peerd.client.training.training_pass import Pass

# Forwards of one websocket that wait for their backward: each holds memory on every hop.
MAX_PASSES = 8
_POLICY = 1008
_NORMAL = 1000


async def serve_session(websocket: WebSocket, models: Models) -> None:
    """Serve one websocket until either side ends it."""
    await websocket.accept()
    try:
        async with open_tasks() as tasks:
            send, receive = trio.open_memory_channel[RawMessage](MAX_WAITING)
            tasks.start_soon(_read, websocket, send, tasks.cancel_scope)
            async with _open(websocket, models, receive) as answers:
                async for raw in receive:
                    await answers.answer(raw)
            await websocket.close(_NORMAL)
    except PeerdError as error:
        await websocket.send_bytes(message_bytes(Failure.of(error)))
        await websocket.close(_POLICY)


async def _read(websocket: WebSocket, send: trio.MemorySendChannel[RawMessage], scope: trio.CancelScope) -> None:
    """Pass on the client's messages, also while a step runs, so that we notice at once when it leaves."""
    while True:
        event = await websocket.receive()
        if event["type"] == "websocket.disconnect":
            scope.cancel()
            return
        data = event.get("bytes")
        if data is None:
            raise RemoteProtocolError("a text message where messages are binary")
        raw = read_message(data)
        if raw.header.get("type") == LocalParameter.TYPE:
            # Thousands of matrices may follow the first message; they are not answered one by one.
            await send.send(raw)
            continue
        try:
            send.send_nowait(raw)
        except trio.WouldBlock:
            raise RemoteProtocolError(f"more than {MAX_WAITING} requests are unanswered") from None


@asynccontextmanager
async def _open(
    websocket: WebSocket, models: Models, receive: trio.MemoryReceiveChannel[RawMessage]
) -> AsyncIterator[_Answers]:
    wanted = read_open(await receive.receive())
    try:
        model = models.named(wanted.model)
    except ApiError as error:
        raise InvalidRequest(str(error)) from None
    blocks = _span(wanted.start, wanted.end or model.facts.block_count, model)
    adapter = _Adapter(wanted.adapter, await read_own_adapter(receive, wanted.parameters))
    async with AsyncExitStack() as stack:
        session = None
        if wanted.max_length:
            opening = model.session(
                max_length=wanted.max_length,
                max_rows=wanted.max_rows,
                max_rollback=wanted.max_rollback,
                prompt_length=wanted.prompt_length,
                blocks=blocks,
                adapter=adapter.own.for_session() or adapter.name or None,
            )
            try:
                session = await stack.enter_async_context(opening)
            except AdapterError as error:
                raise InvalidRequest(str(error)) from None
        opened = SessionOpened(blocks.start, blocks.end, model.facts.width, model.facts.dtype)
        await websocket.send_bytes(message_bytes(opened))
        answers = _Answers(websocket, model, session, blocks, adapter)
        try:
            yield answers
        finally:
            answers.close()


class _Adapter:
    """The adapter of a websocket: either one of the swarm, by name, or the program's own."""

    def __init__(self, name: str, own: OwnAdapter) -> None:
        if name and own.for_session() is not None:
            raise InvalidRequest(f"the adapter {name} and matrices of your own: a session has one of both")
        if "/" in name or name in (".", "..", "~"):
            raise InvalidRequest(f"{name}: an adapter's name in the swarm; send your own as parameters")
        self.name = name
        self.own = own


def _span(start: int, end: int, model: SwarmModel) -> Span:
    if not start < end <= model.facts.block_count:
        raise InvalidRequest(f"{model.facts.name} has blocks 0:{model.facts.block_count}, not {start}:{end}")
    return Span(start, end)


class _Answers:
    """Answers one websocket's requests in order, and keeps the forwards that wait for a backward."""

    def __init__(
        self, websocket: WebSocket, model: SwarmModel, session: Session | None, blocks: Span, adapter: _Adapter
    ) -> None:
        self._websocket = websocket
        self._model = model
        self._session = session
        self._blocks = blocks
        self._adapter = adapter
        self._width = model.facts.width
        self._passes: dict[int, Pass] = {}

    def close(self) -> None:
        """Let the peers free the passes that wait for a backward."""
        for kept in self._passes.values():
            kept.close()

    async def answer(self, raw: RawMessage) -> None:
        asked = parse(raw.header, FROM_CLIENT)
        assert isinstance(asked, Step | Embed | Logits | LocalForward | LocalBackward)
        try:
            answers = await self._answer(asked, raw.body)
        except PeerdError as error:
            answers = [message_bytes(Failure.of(error, asked.seq))]
        for answer in answers:
            await self._websocket.send_bytes(answer)

    async def _answer(
        self, asked: Step | Embed | Logits | LocalForward | LocalBackward, body: memoryview
    ) -> Iterable[bytes]:
        if isinstance(asked, Embed):
            return [_output(asked.seq, (), self._model.embed(asked.token_ids, asked.start))]
        if isinstance(asked, Logits):
            hidden = tensor_of(asked.tensor, body, self._width)
            return [_output(asked.seq, (), await self._model.logits(hidden))]
        if isinstance(asked, LocalForward):
            return [await self._forward(asked, body)]
        if isinstance(asked, LocalBackward):
            return await self._backward(asked, body)
        return [await self._step(asked, body)]

    async def _step(self, step: Step, body: memoryview) -> bytes:
        if self._session is None:
            raise InvalidRequest("this websocket was opened without a session: open one with max_length")
        hidden = tensor_of(step.tensor, body, self._width) if step.rows else _nothing(self._width)
        if len(hidden) != step.positions:
            raise InvalidRequest(f"the rows have {step.positions} positions, the tensor {len(hidden)}")
        result = await self._session.step(hidden, rows=step.rows, ops=step.ops, want=step.want)
        if step.want == "last":
            return _output(step.seq, tuple(RowSlice(piece.row, piece.end - 1, 1) for piece in step.rows), result)
        return _output(step.seq, step.rows if step.want == "all" else (), result)

    async def _forward(self, asked: LocalForward, body: memoryview) -> bytes:
        if len(self._passes) >= MAX_PASSES:
            raise InvalidRequest(f"{MAX_PASSES} forwards wait for their backward already")
        if asked.seq in self._passes:
            raise InvalidRequest(f"the forward {asked.seq} waits for its backward already")
        header = header_of(asked.tensor)
        hidden = tensor_of(asked.tensor, body[: header.body_bytes], self._width)
        if sum(asked.rows) != len(hidden):
            raise InvalidRequest(f"the rows have {sum(asked.rows)} positions, the tensor {len(hidden)}")
        prompts = None
        if asked.prompts is not None:
            prompts = decoded(header_of(asked.prompts), body[header.body_bytes :])
        run = await self._model.forward(
            hidden,
            rows=asked.rows,
            blocks=self._blocks,
            prompts=prompts,
            lora=self._adapter.own.pairs,
            prefixes=self._adapter.own.prefixes,
            adapter=self._adapter.name,
            keep=asked.keep,
        )
        if asked.keep:
            self._passes[asked.seq] = run
        return _output(asked.seq, (), run.output)

    async def _backward(self, asked: LocalBackward, body: memoryview) -> Iterable[bytes]:
        grad = tensor_of(asked.tensor, body, self._width)
        run = self._passes.pop(asked.of, None)
        if run is None:
            raise InvalidRequest(
                f"no forward {asked.of} waits for its backward: a forward needs keep, and can have one backward only"
            )
        found = await run.backward(grad)
        header, parts = encode_tensor(found.hidden)
        prompts = None
        if found.prompts is not None:
            prompt_header, prompt_parts = encode_tensor(found.prompts)
            prompts, parts = prompt_header.to_fields(), [*parts, *prompt_parts]
        parameters = 2 * (len(found.lora) + len(found.prefixes))
        reply = GradientsOutput(asked.seq, header.to_fields(), prompts, parameters)
        return itertools.chain([message_bytes(reply, parts)], gradient_messages(found))


def _nothing(width: int) -> torch.Tensor:
    import torch

    return torch.empty((0, width))


def _output(seq: int, rows: tuple[RowSlice, ...], result: torch.Tensor) -> bytes:
    if not result.numel():
        return message_bytes(Output(epoch=0, seq=seq))
    header, body = encode_tensor(result)
    return message_bytes(Output(epoch=0, seq=seq, rows=rows, tensor=header.to_fields()), body)

"""`/peerd/v1/session`: a session of tensors for a program on this machine, over a websocket.

Knows the messages and the model's session; knows no HTTP. Requests are answered in their order, one at a time: a long
step is cut into pieces for the swarm anyway. The session ends with the websocket.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio
from starlette.websockets import WebSocket, WebSocketDisconnect

from peerd.api.errors import ApiError
from peerd.api.tensor_messages import (
    FROM_CLIENT,
    Embed,
    Logits,
    SessionOpened,
    message_bytes,
    read_message,
    read_open,
)
from peerd.nurseries import open_tasks
from peerd.protocol.errors import InvalidRequest, PeerdError, RemoteProtocolError
from peerd.protocol.messages import MAX_STEP_POSITIONS, Failure, Output, Step
from peerd.protocol.rows import RowSlice
from peerd.protocol.schema import parse
from peerd.protocol.span import Span
from peerd.protocol.tensors import TensorHeader, decode_tensor, encode_tensor
from peerd.protocol.wire import RawMessage

if TYPE_CHECKING:
    import torch

    from peerd.api.models import Models
    from peerd.model import RemoteModel
    from peerd.session import Session

# Requests that a client may send before the first is answered.
MAX_WAITING = 8
_POLICY = 1008
_NORMAL = 1000


async def serve_session(websocket: WebSocket, models: Models) -> None:
    """Serve one websocket until either side has enough."""
    await websocket.accept()
    try:
        async with open_tasks() as tasks:
            send, receive = trio.open_memory_channel[RawMessage](MAX_WAITING)
            tasks.start_soon(_read, websocket, send, tasks.cancel_scope)
            async with _open(websocket, models, receive) as (model, session):
                async for raw in receive:
                    await _answer(websocket, model, session, raw)
            await websocket.close(_NORMAL)
    except PeerdError as error:
        await websocket.send_bytes(message_bytes(Failure.of(error)))
        await websocket.close(_POLICY)


async def _read(websocket: WebSocket, send: trio.MemorySendChannel[RawMessage], scope: trio.CancelScope) -> None:
    """Pass on what the client says, also while a step runs: so that we learn at once when it leaves."""
    while True:
        try:
            data = await websocket.receive_bytes()
        except WebSocketDisconnect:
            scope.cancel()
            return
        except KeyError:
            raise RemoteProtocolError("a text message where messages are binary") from None
        try:
            send.send_nowait(read_message(data))
        except trio.WouldBlock:
            raise RemoteProtocolError(f"more than {MAX_WAITING} requests are unanswered") from None


@asynccontextmanager
async def _open(
    websocket: WebSocket, models: Models, receive: trio.MemoryReceiveChannel[RawMessage]
) -> AsyncIterator[tuple[RemoteModel, Session]]:
    wanted = read_open(await receive.receive())
    try:
        model = models.named(wanted.model)
    except ApiError as error:
        raise InvalidRequest(str(error)) from None
    blocks = _span(wanted.start, wanted.end or model.facts.block_count, model)
    async with model.session(
        max_length=wanted.max_length, max_rows=wanted.max_rows, max_rollback=wanted.max_rollback, blocks=blocks
    ) as session:
        opened = SessionOpened(blocks.start, blocks.end, model.facts.width, model.facts.dtype)
        await websocket.send_bytes(message_bytes(opened))
        yield model, session


def _span(start: int, end: int, model: RemoteModel) -> Span:
    if not start < end <= model.facts.block_count:
        raise InvalidRequest(f"{model.facts.name} has blocks 0:{model.facts.block_count}, not {start}:{end}")
    return Span(start, end)


async def _answer(websocket: WebSocket, model: RemoteModel, session: Session, raw: RawMessage) -> None:
    asked = parse(raw.header, FROM_CLIENT)
    assert isinstance(asked, Step | Embed | Logits)
    try:
        rows, result = await _result(model, session, asked, raw.body)
    except PeerdError as error:
        await websocket.send_bytes(message_bytes(Failure.of(error, asked.seq)))
        return
    await websocket.send_bytes(_output(asked.seq, rows, result))


async def _result(
    model: RemoteModel, session: Session, asked: Step | Embed | Logits, body: memoryview
) -> tuple[tuple[RowSlice, ...], torch.Tensor]:
    if isinstance(asked, Embed):
        return (), model.embed(asked.token_ids, asked.start)
    if isinstance(asked, Logits):
        return (), await model.logits(_tensor(asked.tensor, body, model.facts.width))
    return await _step(session, asked, body, model.facts.width)


async def _step(
    session: Session, step: Step, body: memoryview, width: int
) -> tuple[tuple[RowSlice, ...], torch.Tensor]:
    hidden = _tensor(step.tensor, body, width) if step.rows else _nothing(width)
    if len(hidden) != step.positions:
        raise InvalidRequest(f"the rows have {step.positions} positions, the tensor {len(hidden)}")
    result = await session.step(hidden, rows=step.rows, ops=step.ops, want=step.want)
    if step.want == "last":
        return tuple(RowSlice(piece.row, piece.end - 1, 1) for piece in step.rows), result
    return (step.rows if step.want == "all" else ()), result


def _tensor(fields: dict[str, object] | None, body: memoryview, width: int) -> torch.Tensor:
    """The body's tensor, `[n, width]`. What a program of ours sends wrongly is its own mistake."""
    if fields is None:
        raise InvalidRequest("a tensor is missing")
    try:
        header = TensorHeader.from_fields(fields, max_elements=MAX_STEP_POSITIONS * width)
        if len(header.shape) != 2 or header.shape[1] != width:
            raise InvalidRequest(f"a tensor of shape {list(header.shape)}, not [n, {width}]")
        return decode_tensor(header, body)
    except RemoteProtocolError as error:
        raise InvalidRequest(str(error)) from None


def _nothing(width: int) -> torch.Tensor:
    import torch

    return torch.empty((0, width))


def _output(seq: int, rows: tuple[RowSlice, ...], result: torch.Tensor) -> bytes:
    if not result.numel():
        return message_bytes(Output(epoch=0, seq=seq))
    header, body = encode_tensor(result)
    return message_bytes(Output(epoch=0, seq=seq, rows=rows, tensor=header.to_fields()), body)

"""Responses that take a while, and stop working when the client hangs up.

A writer knows the form of an API; this file knows when which part of it is sent. An error can have a status only while
nothing was sent. So the first token is awaited before the first byte is sent.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import trio
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peerd.api.error_shapes import error_response
from peerd.api.errors import ApiError, api_error
from peerd.api.openai.answering import Answering
from peerd.api.openai.answers import Answers
from peerd.client.picked import Picked
from peerd.protocol.errors import PeerdError
from peerd.trio_tools import open_tasks

# How a client names its request, and is told the name of it.
_REQUEST_ID = "x-request-id"
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Writer(Protocol):
    """Writes the answers to one request in the form of an API."""

    @property
    def content_type(self) -> str:
        """Of a stream."""

    @property
    def answer_id(self) -> str:
        """What the client may call the answer by."""

    def opening(self) -> bytes:
        """What a stream begins with."""

    def piece(self, picked: Picked) -> bytes:
        """What a stream says of one token."""

    def closing(self) -> bytes:
        """What a stream that was not cut off ends with."""

    def failure(self, error: ApiError) -> bytes:
        """What a stream that was cut off ends with."""

    def whole(self, answers: Sequence[Sequence[Picked]]) -> dict[str, Any]:
        """All answers in one body."""


class _LongResponse(Response):
    """Takes a place among the answers, and is computed until the client hangs up."""

    def __init__(self, answering: Answering, answer_id: str) -> None:
        super().__init__()
        self._answering = answering
        self._answer_id = answer_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(_REQUEST_ID, "")
        names = [given, self._answer_id] if _NAME.fullmatch(given) else [self._answer_id]
        named = _naming(send, names[0])
        try:
            with self._answering.place(*names) as self._place:
                await self._answer(scope, receive, named)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, named)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: ASGIApp | None = None
        async with open_tasks() as tasks:
            tasks.start_soon(_cancel_on_disconnect, receive, tasks.cancel_scope)
            response = await self._respond(scope["path"], send)
        # The end of a response counts as a disconnect too, which must not cancel the response.
        if response is not None:
            await response(scope, receive, send)

    async def _respond(self, path: str, send: Send) -> ASGIApp:
        try:
            return await self._compute(send)
        except PeerdError as error:
            return error_response(api_error(error), path)
        except ApiError as error:
            return error_response(error, path)

    async def _compute(self, send: Send) -> ASGIApp:
        """Compute the answer. Returns the response that is still to be sent. Raises PeerdError, ApiError."""
        raise NotImplementedError


class ComputedResponse(_LongResponse):
    """A response that `compute` makes, and that comes at once."""

    def __init__(self, compute: Callable[[], Awaitable[Response]], answering: Answering) -> None:
        super().__init__(answering, f"req-{uuid.uuid4().hex}")
        self._make = compute

    async def _compute(self, send: Send) -> ASGIApp:
        async with aclosing(self._only()) as only, aclosing(self._answering.pieces(only, self._place)) as responses:
            return await anext(responses)

    async def _only(self) -> AsyncGenerator[Response, None]:
        yield await self._make()


class AnswerResponse(_LongResponse):
    """A request's answers, in one body or as a stream. `count`: of answers."""

    def __init__(self, answers: Answers, writer: Writer, *, count: int, stream: bool, answering: Answering) -> None:
        super().__init__(answering, writer.answer_id)
        self._answers = answers
        self._writer = writer
        self._count = count
        self._stream = stream

    async def _compute(self, send: Send) -> ASGIApp:
        async with self._answers.open() as picked, aclosing(self._answering.pieces(picked, self._place)) as tokens:
            if self._stream:
                first = await anext(tokens)
                await self._send_stream(send, first, tokens)
                return _end
            return JSONResponse(await self._collect(tokens))

    async def _collect(self, tokens: AsyncGenerator[Picked, None]) -> dict[str, Any]:
        answers: list[list[Picked]] = [[] for _ in range(self._count)]
        async for picked in tokens:
            answers[picked.row].append(picked)
        return self._writer.whole(answers)

    async def _send_stream(self, send: Send, first: Picked, tokens: AsyncGenerator[Picked, None]) -> None:
        writer = self._writer
        headers = [
            (b"content-type", writer.content_type.encode()),
            (b"cache-control", b"no-cache"),
            # Without this, proxies would collect pieces.
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send_more(send, writer.opening() + writer.piece(first))
        try:
            async for picked in tokens:
                if data := writer.piece(picked):
                    await _send_more(send, data)
        except (PeerdError, ApiError) as error:
            await _send_more(send, writer.failure(api_error(error) if isinstance(error, PeerdError) else error))
        else:
            await _send_more(send, writer.closing())


def _naming(send: Send, name: str) -> Send:
    """Tell the client the name of its request."""
    header = (_REQUEST_ID.encode(), name.encode())

    async def send_named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return send_named


async def _end(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the end of a stream."""
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_more(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()

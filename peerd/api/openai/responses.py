"""Responses that take a while, and stop working when the client hangs up.

An error can have a status only while nothing was sent. So the first token is awaited before the first byte is sent.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import trio
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from peerd.api.errors import ApiError, api_error
from peerd.api.openai.answering import Answering
from peerd.api.openai.answers import Answers
from peerd.api.openai.bodies import Shape
from peerd.client.picked import Picked
from peerd.protocol.errors import PeerdError
from peerd.trio_tools import open_tasks

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Without this, proxies would collect pieces.
    (b"x-accel-buffering", b"no"),
]


class AnswerResponse(Response):
    """A request's answers, in one body or as server-sent events."""

    def __init__(
        self,
        answers: Answers,
        shape: Shape,
        *,
        count: int,
        stream: bool,
        include_usage: bool,
        include_chain: bool = False,
        continuous_usage: bool = False,
        answering: Answering,
    ) -> None:
        super().__init__()
        self._answers = answers
        self._shape = shape
        self._count = count
        self._stream = stream
        self._include_usage = include_usage
        self._include_chain = include_chain
        self._continuous_usage = continuous_usage
        self._chain: dict[str, Any] | None = None
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._answering.place():
                await self._answer(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: ASGIApp | None = None
        async with open_tasks() as tasks:
            tasks.start_soon(_cancel_on_disconnect, receive, tasks.cancel_scope)
            response = await self._respond(send)
        # The end of a response counts as a disconnect too, which must not cancel the response.
        if response is not None:
            await response(scope, receive, send)

    async def _respond(self, send: Send) -> ASGIApp:
        """Compute the answers. Returns the response that is still to be sent, or None if events were sent."""
        try:
            async with self._answers.open() as picked, aclosing(self._answering.pieces(picked)) as tokens:
                if self._stream:
                    first = await anext(tokens)
                    await self._send_events(send, first, tokens)
                    return _end
                return JSONResponse(await self._collect(tokens))
        except PeerdError as error:
            return api_error(error).response()
        except ApiError as error:
            return error.response()

    async def _collect(self, tokens: AsyncGenerator[Picked, None]) -> dict[str, Any]:
        answers: list[list[Picked]] = [[] for _ in range(self._count)]
        async for picked in tokens:
            answers[picked.row].append(picked)
        return self._shape.whole(answers, self._answers.usage.to_json())

    async def _send_events(self, send: Send, first: Picked, tokens: AsyncGenerator[Picked, None]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        opening = [piece for index in range(self._count) if (piece := self._shape.opening(index))]
        await _send_data(send, *map(self._counted, [*opening, *self._chain_news(), self._shape.piece(first)]))
        try:
            async for picked in tokens:
                await _send_data(send, *map(self._counted, [*self._chain_news(), self._shape.piece(picked)]))
        except (PeerdError, ApiError) as error:
            said = api_error(error) if isinstance(error, PeerdError) else error
            await _send_data(send, said.body)
        else:
            if self._include_usage:
                await _send_data(send, self._shape.usage(self._answers.usage.to_json()))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})

    def _counted(self, piece: dict[str, Any]) -> dict[str, Any]:
        """A piece with its field `usage`: null, as OpenAI has it, or what vLLM's clients ask for, the usage so far."""
        if not self._include_usage:
            return piece
        return piece | {"usage": self._answers.usage.to_json() if self._continuous_usage else None}

    def _chain_news(self) -> list[dict[str, Any]]:
        """The chain, where it was asked for and has changed since it was last said."""
        if not self._include_chain:
            return []
        chain = self._answers.chain()
        if chain == self._chain:
            return []
        self._chain = chain
        return [self._shape.chain(chain)]


async def _end(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the end of an event stream."""
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_data(send: Send, *values: dict[str, Any]) -> None:
    body = b"".join(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n" for value in values)
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()

"""The paths of the local API. Each endpoint reads its request and passes it on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import trio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from peerd.api.errors import ApiError, api_error
from peerd.api.fields import Fields, body_limit, parse_json, read_body
from peerd.api.http.catch_all import answer_bug, answer_nobody
from peerd.api.models import Models
from peerd.api.openai.answering import Answering
from peerd.api.openai.answers import Answers, encode_prompt
from peerd.api.openai.bodies import ChatShape, CompletionShape
from peerd.api.openai.chat_prompts import chat_prompt
from peerd.api.openai.chat_templates import ChatTemplates
from peerd.api.openai.requests import CommonFields, read_chat, read_completion
from peerd.api.openai.responses import AnswerResponse
from peerd.api.openai.tool_bodies import ToolChatShape
from peerd.api.status import Status
from peerd.api.tensors.session import serve_session
from peerd.api.web.files import page_routes
from peerd.api.web.history import History
from peerd.api.web.swarm import SwarmView
from peerd.client.shown_tokens import decoder_showing
from peerd.protocol.errors import PeerdError

# A body of this size may hold so many token ids that checking them takes longer than other requests should wait.
_LARGE_BODY_BYTES = 65536

T = TypeVar("T")


class Api:
    """The endpoints over one daemon's models."""

    def __init__(
        self,
        models: Models,
        templates: ChatTemplates,
        status: Status,
        swarm: SwarmView,
        history: History,
        answering: Answering,
    ) -> None:
        self._models = models
        self._templates = templates
        self._status = status
        self._swarm = swarm
        self._history = history
        self._answering = answering

    def app(self) -> Starlette:
        """The ASGI application."""
        routes: list[BaseRoute] = [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/peerd/v1/status", self.status),
            Route("/peerd/v1/swarm", self.swarm),
            Route("/healthz", self.health),
            Route("/readyz", self.readiness),
            WebSocketRoute("/peerd/v1/session", self.session),
            *page_routes(),
        ]
        errors: dict[Any, Any] = {
            ApiError: _refuse,
            PeerdError: _refuse_peerd,
            ClientDisconnect: answer_nobody,
            Exception: answer_bug,
            404: _not_found,
            405: _wrong_method,
        }
        return Starlette(routes=routes, exception_handlers=errors)

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._models.described(name) for name, _ in self._models]})

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(self._models.described(request.path_params["name"]))

    async def complete(self, request: Request) -> Response:
        wanted = await self._read(request, read_completion)
        model = self._models.named(wanted.common.model)
        prompts = [await encode_prompt(model, prompt) for prompt in wanted.prompts]
        answers = Answers(model, wanted.common, prompts, self._history.count_token)
        echoes = [
            await model.in_thread(model.decode, prompt) if wanted.echo else ""
            for prompt in prompts
            for _ in range(wanted.common.rows)
        ]
        shape = CompletionShape(wanted.common.model, model.token_bytes, echoes)
        return self._respond(answers, shape, len(echoes), wanted.common)

    async def chat(self, request: Request) -> Response:
        wanted = await self._read(request, read_chat)
        model = self._models.named(wanted.common.model)
        rendered = await chat_prompt(model, wanted, self._templates)
        prompt = await model.tokenize(rendered.text, add_special_tokens=False)
        name, rows = wanted.common.model, wanted.common.rows
        shape, decode = ChatShape(name, model.token_bytes), None
        if wanted.tools is not None and rendered.form is not None:
            make_reader = partial(rendered.form.reader, wanted.tools.schemas)
            shape = ToolChatShape(name, model.token_bytes, make_reader, rows, parallel=wanted.tools.parallel)
            decode = decoder_showing(model.tokenizer, rendered.form.marks)
        answers = Answers(model, wanted.common, [prompt], self._history.count_token, decode)
        return self._respond(answers, shape, rows, wanted.common)

    async def status(self, request: Request) -> Response:
        return JSONResponse(await self._status.describe() | {"answering": self._answering.count})

    async def swarm(self, request: Request) -> Response:
        return JSONResponse(await self._swarm.describe())

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readiness(self, request: Request) -> Response:
        ready, problem = await self._status.is_ready()
        return PlainTextResponse("ready\n") if ready else PlainTextResponse(f"{problem}\n", 503)

    async def session(self, websocket: WebSocket) -> None:
        await serve_session(websocket, self._models)

    async def _read(self, request: Request, read: Callable[[Fields], T]) -> T:
        """The request that `read` finds in the body's fields. Raises ApiError."""
        body = await read_body(request, body_limit(model.facts.max_length for _, model in self._models))
        if len(body) < _LARGE_BODY_BYTES:
            return read(parse_json(body))
        return await trio.to_thread.run_sync(lambda: read(parse_json(body)))

    def _respond(
        self, answers: Answers, shape: ChatShape | CompletionShape, count: int, common: CommonFields
    ) -> Response:
        return AnswerResponse(
            answers,
            shape,
            count=count,
            stream=common.stream,
            include_usage=common.include_usage,
            include_chain=common.include_chain,
            continuous_usage=common.continuous_usage,
            answering=self._answering,
        )


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refuse_peerd(request: Request, error: Exception) -> Response:
    assert isinstance(error, PeerdError)
    return api_error(error).response()


async def _not_found(request: Request, error: Exception) -> Response:
    return ApiError(404, f"there is no {request.url.path[:200]} here", code="unknown_url").response()


async def _wrong_method(request: Request, error: Exception) -> Response:
    allowed = getattr(error, "headers", None) or {}
    return ApiError(405, f"{request.method} is not for {request.url.path[:200]}", headers=allowed).response()

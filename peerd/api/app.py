"""The paths of the local API. Each endpoint reads its request and passes it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from peerd.api.anthropic.endpoints import MessagesApi
from peerd.api.chats import Chats
from peerd.api.embeddings.endpoints import EmbeddingsApi
from peerd.api.error_shapes import error_response
from peerd.api.errors import ApiError, api_error
from peerd.api.http.catch_all import answer_bug, answer_nobody
from peerd.api.models import Models
from peerd.api.ollama.endpoints import OllamaApi
from peerd.api.openai.answering import Answering
from peerd.api.openai.answers import Answers, compiled_grammar, encode_prompt
from peerd.api.openai.bodies import CompletionShape, Shape
from peerd.api.openai.chat_templates import ChatTemplates
from peerd.api.openai.echoes import Echo, scored_echo
from peerd.api.openai.event_writer import EventWriter
from peerd.api.openai.requests import CommonFields, CompletionRequest, read_chat, read_completion
from peerd.api.responses.endpoints import ResponsesApi
from peerd.api.status import Status
from peerd.api.tensors.session import serve_session
from peerd.api.tokens import TokensApi
from peerd.api.web.files import page_routes
from peerd.api.web.history import History
from peerd.api.web.swarm import SwarmView
from peerd.protocol.errors import PeerdError

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel


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
        self._status = status
        self._swarm = swarm
        self._chats = Chats(models, templates, history, answering)

    def app(self, *more: BaseRoute) -> Starlette:
        """The ASGI application, with `more` paths beside its own."""
        routes: list[BaseRoute] = [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/requests/{id}/cancel", self.cancel, methods=["POST"]),
            Route("/peerd/v1/status", self.status),
            Route("/peerd/v1/swarm", self.swarm),
            Route("/healthz", self.health),
            # What vLLM and llama.cpp call it, which benchmarks ask for before they begin.
            Route("/health", self.health),
            Route("/readyz", self.readiness),
            WebSocketRoute("/peerd/v1/session", self.session),
            *MessagesApi(self._chats).routes(),
            *ResponsesApi(self._chats).routes(),
            *OllamaApi(self._chats).routes(),
            *EmbeddingsApi(self._chats).routes(),
            *TokensApi(self._chats).routes(),
            *more,
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
        # Anthropic's clients name the version of its API in every request.
        is_anthropic = "anthropic-version" in request.headers
        return JSONResponse(self._models.listed_for_anthropic() if is_anthropic else self._models.listed())

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(self._models.described(request.path_params["name"]))

    async def complete(self, request: Request) -> Response:
        wanted = await self._chats.read(request, read_completion)
        model = self._models.named(wanted.common.model)
        prompts = [await encode_prompt(model, prompt) for prompt in wanted.prompts]
        grammar = await compiled_grammar(model, wanted.common)
        scores = wanted.echo and wanted.common.top_logprobs is not None
        count_token = self._chats.history.count_token
        answers = Answers(model, wanted.common, prompts, count_token, grammar=grammar, scores_prompts=scores)
        echoes = [await _echo(model, wanted, prompt) for prompt in prompts for _ in range(wanted.common.rows)]
        only_prompts = wanted.common.max_tokens == 0
        shape = CompletionShape(wanted.common.model, model.token_bytes, echoes, only_prompts=only_prompts)
        return self._respond(answers, shape, len(echoes), wanted.common)

    async def chat(self, request: Request) -> Response:
        wanted = await self._chats.read(request, read_chat)
        chat = await self._chats.open(wanted)
        return self._respond(chat.answers, chat.shape, wanted.common.rows, wanted.common)

    async def cancel(self, request: Request) -> Response:
        request_id = request.path_params["id"]
        if not self._chats.answering.cancel(request_id):
            problem = f"there is no request {request_id[:100]!r} that is being answered"
            raise ApiError(404, problem, code="request_not_found")
        return JSONResponse({"id": request_id, "cancelled": True})

    async def status(self, request: Request) -> Response:
        return JSONResponse(await self._status.describe() | {"answering": self._chats.answering.count})

    async def swarm(self, request: Request) -> Response:
        return JSONResponse(await self._swarm.describe())

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readiness(self, request: Request) -> Response:
        ready, problem = await self._status.is_ready()
        return PlainTextResponse("ready\n") if ready else PlainTextResponse(f"{problem}\n", 503)

    async def session(self, websocket: WebSocket) -> None:
        await serve_session(websocket, self._models)

    def _respond(self, answers: Answers, shape: Shape, count: int, common: CommonFields) -> Response:
        writer = EventWriter(answers, shape, count, common)
        return self._chats.respond(answers, writer, count=count, stream=common.stream)


async def _echo(model: SwarmModel, wanted: CompletionRequest, prompt: Sequence[int]) -> Echo:
    """The prompt as its answers repeat it."""
    if not wanted.echo:
        return Echo()
    if wanted.common.top_logprobs is None:
        return Echo(await model.in_thread(model.decode, prompt))
    return await model.in_thread(scored_echo, model.decode, prompt)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.url.path)


async def _refuse_peerd(request: Request, error: Exception) -> Response:
    assert isinstance(error, PeerdError)
    return error_response(api_error(error), request.url.path)


async def _not_found(request: Request, error: Exception) -> Response:
    path = request.url.path
    return error_response(ApiError(404, f"there is no {path[:200]} here", code="unknown_url"), path)


async def _wrong_method(request: Request, error: Exception) -> Response:
    allowed = getattr(error, "headers", None) or {}
    path = request.url.path
    return error_response(ApiError(405, f"{request.method} is not for {path[:200]}", headers=allowed), path)

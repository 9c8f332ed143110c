"""The endpoints of Ollama's API."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peerd.api.chats import Chats
from peerd.api.fields import Fields
from peerd.api.ollama.models import listed, running, shown
from peerd.api.ollama.requests import OllamaRequest, read_chat_request, read_generate_request
from peerd.api.ollama.writer import LineWriter, Shown, as_message, as_response, line
from peerd.api.openai.requests import ChatRequest

# Some clients ask for a version of Ollama. This is the one whose API we follow.
FOLLOWED_VERSION = "0.12.0"


class OllamaApi:
    """Answers /api."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats
        self._since = datetime.now(UTC).isoformat().replace("+00:00", "Z")

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            Route("/api/chat", self.chat, methods=["POST"]),
            Route("/api/generate", self.generate, methods=["POST"]),
            Route("/api/tags", self.list_models),
            Route("/api/ps", self.list_running),
            Route("/api/show", self.show_model, methods=["POST"]),
            Route("/api/version", self.version),
        ]

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat_request, as_message)

    async def generate(self, request: Request) -> Response:
        return await self._answer(request, read_generate_request, as_response)

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"models": [listed(name, model, self._since) for name, model in self._chats.models]})

    async def list_running(self, request: Request) -> Response:
        return JSONResponse({"models": [running(name, model, self._since) for name, model in self._chats.models]})

    async def show_model(self, request: Request) -> Response:
        name = await self._chats.read(request, _read_name)
        return JSONResponse(shown(self._chats.models.named(name), self._since))

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": FOLLOWED_VERSION})

    async def _answer(self, request: Request, read: Callable[[Fields], OllamaRequest], show: Shown) -> Response:
        asked = await self._chats.read(request, read)
        wanted = asked.wanted
        if wanted is None:
            # That loads a model in Ollama; ours are loaded.
            self._chats.models.named(asked.model)
            return JSONResponse(line(asked.model, show("", "", []) | {"done": True, "done_reason": "load"}))
        with asked.translation.naming():
            if isinstance(wanted, ChatRequest):
                chat = await self._chats.open(wanted)
            else:
                chat = await self._chats.open_text(wanted)
        writer = LineWriter(chat, asked.model, show)
        return self._chats.respond(chat.answers, writer, count=1, stream=wanted.common.stream)


def _read_name(fields: Fields) -> str:
    name = fields.text("model") or fields.text("name")
    if name is None:
        raise fields.error("model", "is missing", code="missing_required_parameter")
    fields.ignore("verbose")
    fields.refuse_others()
    return name

"""The endpoints of Anthropic's API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peerd.api.anthropic.requests import read_count_request, read_messages_request
from peerd.api.anthropic.writer import MessageWriter
from peerd.api.chats import Chats


class MessagesApi:
    """Answers /v1/messages."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            Route("/v1/messages", self.answer, methods=["POST"]),
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
        ]

    async def answer(self, request: Request) -> Response:
        wanted = await self._chats.read(request, read_messages_request)
        common = wanted.chat.common
        with wanted.translation.naming():
            chat = await self._chats.open(wanted.chat)
        return self._chats.respond(chat.answers, MessageWriter(chat, common.model), count=1, stream=common.stream)

    async def count_tokens(self, request: Request) -> Response:
        wanted = await self._chats.read(request, read_count_request)
        with wanted.translation.naming():
            prompt = await self._chats.prompt(wanted.chat)
        return JSONResponse({"input_tokens": len(prompt)})

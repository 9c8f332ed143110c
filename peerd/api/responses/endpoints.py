"""The endpoints of OpenAI's responses."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peerd.api.chats import Chats
from peerd.api.errors import ApiError, invalid
from peerd.api.fields import Fields
from peerd.api.responses.requests import ResponsesRequest, read_responses_request
from peerd.api.responses.store import ResponseStore, memory_of
from peerd.api.responses.writer import ResponseWriter


class ResponsesApi:
    """Answers /v1/responses, and keeps what it has answered."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats
        self._store = ResponseStore(time.monotonic)

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            Route("/v1/responses", self.answer, methods=["POST"]),
            Route("/v1/responses/{id}", self.stored, methods=["GET", "DELETE"]),
        ]

    async def answer(self, request: Request) -> Response:
        wanted = await self._chats.read(request, self._read)
        with wanted.translation.naming():
            chat = await self._chats.open(wanted.chat)
        writer = ResponseWriter(chat, wanted, partial(self._keep, wanted))
        return self._chats.respond(chat.answers, writer, count=1, stream=wanted.chat.common.stream)

    async def stored(self, request: Request) -> Response:
        """Show a response, or delete it."""
        response_id = request.path_params["id"]
        if request.method == "DELETE":
            if not self._store.remove(response_id):
                raise _missing(response_id)
            return JSONResponse({"id": response_id, "object": "response", "deleted": True})
        if request.query_params.get("stream", "false") != "false":
            raise invalid("stream is not supported here: a response is kept whole", "stream")
        found = self._store.get(response_id)
        if found is None:
            raise _missing(response_id)
        return JSONResponse(found.body)

    def _read(self, fields: Fields) -> ResponsesRequest:
        return read_responses_request(fields, self._store)

    def _keep(self, wanted: ResponsesRequest, body: dict[str, Any], message: dict[str, Any]) -> None:
        size_bytes = wanted.size_bytes + memory_of([body["output"], message])
        self._store.keep(body, (*wanted.messages, message), size_bytes)


def _missing(response_id: str) -> ApiError:
    return ApiError(
        404,
        f"there is no response {response_id[:100]!r} here: one is kept for an hour, if there is room and unless it was"
        " sent with store: false",
        code="response_not_found",
    )

"""Logs each request of the local API at debug level: what was asked for and how it ended, and no word of its text."""

from __future__ import annotations

import logging

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peerd.api.error_shapes import REFUSAL
from peerd.api.errors import ApiError

log = logging.getLogger(__name__)


class RequestLog:
    """Runs `app`, and logs a line for each HTTP request if debugging is on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not log.isEnabledFor(logging.DEBUG):
            await self._app(scope, receive, send)
            return
        began = trio.current_time()
        status: int | None = None

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            ended = "hung up" if status is None else f"{status}{_refusal(scope)}"
            took_s = trio.current_time() - began
            log.debug("%s %s: %s after %.3f s", scope["method"], scope["path"][:200], ended, took_s)


def _refusal(scope: Scope) -> str:
    """The error's code, and the field that it names. The message may quote what the client sent, and is left out."""
    error = scope.get(REFUSAL)
    named = [text for text in (error.code, error.param) if text is not None] if isinstance(error, ApiError) else []
    # A field's name is the client's word, which must not end the line.
    shown = "".join(each if each.isprintable() else "\ufffd" for each in ", ".join(named))
    return f" ({shown})" if shown else ""

"""Logs each request of the local API at debug level: what was asked for and how it ended, and no word of its text."""

from __future__ import annotations

import json
import logging
from typing import Any

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

# A refusal's body is shorter; a longer body is no refusal.
_MAX_ERROR_BYTES = 65536


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
        refusal = ""

        async def send_noted(message: Message) -> None:
            nonlocal status, refusal
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status is not None and status >= 400 and not refusal:
                refusal = _refusal(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            ended = "hung up" if status is None else f"{status}{refusal}"
            took_s = trio.current_time() - began
            log.debug("%s %s: %s after %.3f s", scope["method"], scope["path"][:200], ended, took_s)


def _refusal(body: bytes) -> str:
    """The error's code, and the field that it names. The message may quote what the client sent, and is left out."""
    if len(body) > _MAX_ERROR_BYTES:
        return ""
    try:
        error: Any = json.loads(body)["error"]
        named = [str(error[name]) for name in ("code", "param") if error[name] is not None]
    except (ValueError, KeyError, TypeError):
        return ""
    return f" ({', '.join(named)})" if named else ""

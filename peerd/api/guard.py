"""Decides which requests may use the local API: on TCP those with the token, and none from foreign web pages.

It is ASGI middleware in front of the API. Browsers are the danger: any page that a user has open can send requests to a
port of this machine. But a page cannot choose the `Host` header (which reveals DNS rebinding), the browser always sends
the page's `Origin`, and a JSON body needs a permission that we never give.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peerd.api.error_shapes import error_response
from peerd.api.errors import ApiError
from peerd.api.web.files import is_page_path

# The names that a client may use for us when it writes a URL for a unix socket.
LOCAL_NAMES = frozenset({"localhost", "peerd"})
# Only tells that the daemon is alive.
_OPEN_PATHS = frozenset({"/health", "/healthz"})


# A name or IPv4 address, or an IPv6 address in brackets; and a port.
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
# What a page of an allowed origin may send, and read of an answer.
_ALLOWED_HEADERS = "Authorization, Content-Type"
# OpenAI's client sends more than a dozen of its own (X-Stainless-*).
_ASKED_HEADERS = re.compile(r"[A-Za-z0-9-]{1,64}( ?, ?[A-Za-z0-9-]{1,64}){0,63}")
_EXPOSED_HEADERS = "Retry-After, X-Request-Id"


@dataclass(frozen=True, slots=True)
class Admission:
    """Who may use the API. If `token` is None, no token is needed; `token_file` is where it lies.

    names: of this daemon, beside `localhost` and `peerd`. origins: of pages that may use it, such as
        `http://localhost:3000`, beside its own.
    """

    token: str | None = None
    token_file: Path | None = None
    names: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()


class Guard:
    """Admits requests to our own names, from our own pages or no page, and with the token if there is one."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission
        self._token = admission.token
        self._names = LOCAL_NAMES | {name.lower() for name in admission.names}
        self._origins = {origin.lower() for origin in admission.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "").lower()
        if origin in self._origins:
            send = _allowing(send, headers["origin"])
        refusal = self._refusal(headers, scope)
        if refusal is None and scope.get("method") == "OPTIONS" and origin in self._origins:
            await _preflight(send, headers)
        elif refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await error_response(refusal, scope["path"])(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": str(refusal)[:120]})

    def _refusal(self, headers: Headers, scope: Scope) -> ApiError | None:
        host, path, kind, method = headers.get("host", ""), scope["path"], scope["type"], scope.get("method", "")
        if len(headers.getlist("host")) > 1 or not self._is_ours(host):
            return ApiError(
                421,
                f"{host[:100]!r} is not a name of this daemon: use localhost or an IP address, or start it with"
                " --allow-host NAME",
            )
        for origin in headers.getlist("origin"):
            if origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower(), *self._origins):
                return ApiError(
                    403,
                    "requests from web pages of another origin are refused; the daemon's --allow-origin ORIGIN admits"
                    " one",
                )
        is_open = path in _OPEN_PATHS or is_page_path(path) or method == "OPTIONS"
        if self._token is not None and not is_open and not self._has_token(headers):
            challenge = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, self._wanted_token(headers, scope), code="invalid_api_key", headers=challenge)
        # A page cannot send the token without asking first, so with it some clients of Ollama's need not name the type.
        may_lack_type = self._token is not None and path.startswith("/api/")
        if kind == "http" and method == "POST" and not may_lack_type and not _is_json(headers.get("content-type", "")):
            return ApiError(415, "the body must be JSON: Content-Type: application/json")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether the host is a known name or an IP address: a page that uses DNS rebinding still sends its own
        name.
        """
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].lower().removeprefix("[").removesuffix("]")
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _wanted_token(self, headers: Headers, scope: Scope) -> str:
        """Says what is wrong with the token. Only callers on this machine are told where it lies."""
        problem = (
            "the token is wrong" if headers.get("authorization") or headers.get("x-api-key") else "a token is needed"
        )
        place = self._admission.token_file
        where = f", with the token in {place}" if place is not None and _is_local(scope) else ""
        return f"{problem}: send Authorization: Bearer TOKEN{where}"

    def _has_token(self, headers: Headers) -> bool:
        assert self._token is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), self._token.encode()):
            return True
        # How Anthropic's clients send it.
        return secrets.compare_digest(headers.get("x-api-key", "").strip().encode(), self._token.encode())


def _is_local(scope: Mapping[str, Any]) -> bool:
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _allowing(send: Send, origin: str) -> Send:
    """Let the browser give the answer to a page of that origin."""
    allowing = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", _EXPOSED_HEADERS.encode()),
        (b"vary", b"Origin"),
    ]

    async def send_allowing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *allowing]}
        await send(message)

    return send_allowing


async def _preflight(send: Send, asked: Headers) -> None:
    """Answer a browser that asks what a page of an allowed origin may send: whatever headers its program sets."""
    wanted = asked.get("access-control-request-headers", "")
    allowed = wanted if _ASKED_HEADERS.fullmatch(wanted) else _ALLOWED_HEADERS
    headers = {
        b"access-control-allow-methods": b"GET, POST, DELETE",
        b"access-control-allow-headers": allowed.encode("latin-1"),
        b"access-control-max-age": b"600",
    }
    await send({"type": "http.response.start", "status": 204, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"

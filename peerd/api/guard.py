"""Decides which requests may use the local API: on TCP those with the token, and none from foreign web pages.

It is ASGI middleware in front of the API. Browsers are the danger: any page that a user has open can send requests to a
port of this machine. But a page cannot choose the `Host` header (which reveals DNS rebinding), the browser always sends
the page's `Origin`, and a JSON body needs a permission that we never give.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from peerd.api.errors import ApiError
from peerd.api.web.files import is_page_path

# The names that a client may use for us when it writes a URL for a unix socket.
LOCAL_NAMES = frozenset({"localhost", "peerd"})
# Only tells that the daemon is alive.
_OPEN_PATHS = frozenset({"/healthz"})


class Guard:
    """Admits requests to our own names, from our own pages or no page, and with the token if there is one."""

    def __init__(self, app: ASGIApp, *, token: str | None, names: Iterable[str] = ()) -> None:
        self._app = app
        self._token = token
        self._names = LOCAL_NAMES | {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope), scope["path"], scope["type"], scope.get("method", ""))
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await refusal.response()(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": str(refusal)[:120]})

    def _refusal(self, headers: Headers, path: str, kind: str, method: str) -> ApiError | None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) > 1 or not self._is_ours(host):
            return ApiError(421, f"{host[:100]!r} is not a name of this daemon: use localhost or an IP address")
        for origin in headers.getlist("origin"):
            if urlsplit(origin).netloc.lower() != host.lower():
                return ApiError(403, "requests from web pages of another origin are refused")
        is_open = path in _OPEN_PATHS or is_page_path(path)
        if self._token is not None and not is_open and not self._has_token(headers):
            challenge = {"WWW-Authenticate": "Bearer"}
            return ApiError(
                401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key", headers=challenge
            )
        if kind == "http" and method == "POST" and not _is_json(headers.get("content-type", "")):
            return ApiError(415, "the body must be JSON: Content-Type: application/json")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether the host is a known name or an IP address: a page that uses DNS rebinding still sends its own
        name.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_token(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        assert self._token is not None
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), self._token.encode())


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"

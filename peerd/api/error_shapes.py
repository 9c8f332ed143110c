"""Errors in the form of the API that was asked: OpenAI's, Anthropic's or Ollama's.

The path decides, for some errors come before an endpoint has seen the request: a wrong token, or a path that there is
not.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from peerd.api.errors import ApiError

#: Where an error's response leaves the error in its scope, for the log.
REFUSAL = "peerd.refusal"
# What Anthropic's clients call these; other errors of the caller's are `invalid_request_error`.
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ErrorResponse(JSONResponse):
    """The complete response to a request for `path` that fails with `error`."""

    def __init__(self, error: ApiError, path: str) -> None:
        super().__init__(error_body(error, path), error.status, headers=error.headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[REFUSAL] = self._error
        await super().__call__(scope, receive, send)


def error_response(error: ApiError, path: str) -> ErrorResponse:
    """The response to a request for `path` that fails with `error`."""
    return ErrorResponse(error, path)


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The error as the clients that use `path` read it."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return anthropic_error(error)
    if path.startswith("/api/"):
        return ollama_error(error)
    return error.body


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Anthropic's body. Its message names the field."""
    kind = _ANTHROPIC_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def ollama_error(error: ApiError) -> dict[str, Any]:
    """Ollama's body. Its message names the field."""
    return {"error": str(error)}

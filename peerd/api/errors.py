"""Errors in the form that OpenAI's clients expect: a status, and a body with message, type, param and code.

The status says whose fault the error is: the caller's, the swarm's, or a bug.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peerd.protocol.errors import CallerError, ContextTooLong, NoChain, Overloaded, PeerdError

# How long a client should wait before it asks again if no server gave a hint: a session's usual length, and the time
# that a new server takes to start.
_OVERLOADED_RETRY_S = 2
_NO_CHAIN_RETRY_S = 5


class ApiError(Exception):
    """The error with which a request is refused."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """An error that is the caller's mistake."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: PeerdError) -> ApiError:
    """The API's error for an error of the swarm."""
    if isinstance(error, ContextTooLong):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, CallerError):
        return ApiError(400, str(error), code=error.code)
    if isinstance(error, Overloaded):
        retry = {"Retry-After": str(math.ceil(error.retry_after_s) or _OVERLOADED_RETRY_S)}
        return ApiError(429, str(error), code=error.code, kind="rate_limit_error", headers=retry)
    if isinstance(error, NoChain):
        retry = {"Retry-After": str(_NO_CHAIN_RETRY_S)}
        return ApiError(503, str(error), code=error.code, kind="server_error", headers=retry)
    return ApiError(502, str(error), code=error.code, kind="server_error")

"""The outermost layer of the API's application: what no endpoint foresaw ends one request, and is logged once.

A client that hangs up while it sends its request is no error of anybody's, so nothing is logged. An exception that we
did not expect is a bug of ours: the client gets an error body, and the log the stack.
"""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from peerd.api.error_shapes import error_response
from peerd.api.errors import ApiError
from peerd.net.containment import Containment


class CatchAll:
    """Runs `app`, and contains its unexpected exceptions."""

    def __init__(self, app: ASGIApp, containment: Containment) -> None:
        self._app = app
        self._containment = containment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._containment.around("the local API"):
            await self._app(scope, receive, send)


async def answer_bug(request: Request, error: Exception) -> Response:
    """What a client is told when an endpoint fails with an exception that we did not expect."""
    message = "a bug of this daemon ended the request; its log has the details, please report it"
    bug = ApiError(500, message, code="internal_error", kind="server_error")
    return error_response(bug, request.url.path)


async def answer_nobody(request: Request, error: Exception) -> Response:
    """What is sent to a client that has hung up: nothing."""
    assert isinstance(error, ClientDisconnect)
    return _Nothing()


class _Nothing(Response):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass

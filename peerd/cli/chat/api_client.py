"""Speaks to a local API over its unix socket: HTTP with h11, and answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import trio

from peerd.protocol.errors import CallerError, PeerdError, Unresponsive

_READ_BYTES = 65536
# An event has one token, and a list of models some thousand names.
_MAX_BYTES = 16 * 2**20
_CONNECT_S = 10.0


class AnswerRefused(CallerError):
    """The daemon refuses to answer, and says why."""


class AnswerFailed(PeerdError):
    """The daemon could not answer, or not to the end; it says why."""


@dataclass(slots=True)
class Figures:
    """What is known of an answer so far. `chain`: the peers that compute it, with their blocks."""

    tokens: int = 0
    chain: list[dict[str, Any]] = field(default_factory=list)
    failovers: int = 0
    finish: str = ""


class ApiClient:
    """Asks the local API behind a socket."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. Raises AnswerRefused, AnswerFailed, Unresponsive."""
        async with aclosing(self._bytes("GET", path, b"")) as pieces:
            data = b"".join([piece async for piece in pieces])
        found = _parsed(data)
        if not isinstance(found, dict):
            raise Unresponsive(f"the daemon on {self._path} answered no JSON object: {data[:100]!r}")
        return found

    async def answer(self, request: dict[str, Any], figures: Figures) -> AsyncGenerator[str, None]:
        """The pieces of text of an answer, as they come; `figures` grow meanwhile. Close it to stop the answer.

        Raises AnswerRefused, AnswerFailed, Unresponsive.
        """
        body = json.dumps(request).encode()
        answer = self._bytes("POST", "/v1/chat/completions", body)
        async with aclosing(answer) as pieces, aclosing(_events(pieces)) as events:
            async for event in events:
                if event == "[DONE]":
                    return
                text = _read_event(event, figures)
                if text:
                    yield text
        raise AnswerFailed("the daemon ended the answer in the middle: it has stopped, or its log says why")

    async def _bytes(self, method: str, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The body of a response, as it comes."""
        try:
            with trio.fail_after(_CONNECT_S):
                stream = await trio.open_unix_socket(self._path)
        except (OSError, trio.TooSlowError) as error:
            raise Unresponsive(f"the daemon on {self._path} cannot be reached: {error}") from None
        async with stream:
            connection = h11.Connection(h11.CLIENT)
            headers = [("Host", "localhost"), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            message = connection.send(h11.Request(method=method, target=path, headers=headers)) or b""
            message += (connection.send(h11.Data(data=body)) or b"") + (connection.send(h11.EndOfMessage()) or b"")
            try:
                await stream.send_all(message)
                async with aclosing(_body(stream, connection)) as pieces:
                    async for piece in pieces:
                        yield piece
            except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
                raise AnswerFailed(f"the daemon on {self._path} has gone: {error}") from None


async def _body(stream: trio.SocketStream, connection: h11.Connection) -> AsyncGenerator[bytes, None]:
    """The body of a good response. Raises AnswerRefused or AnswerFailed for another."""
    status, refusal = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            if status == 200:
                yield bytes(event.data)
            elif len(refusal) < _MAX_BYTES:
                refusal += event.data
        else:
            break
    if status != 200:
        raise _refused(status, _parsed(bytes(refusal)))


async def _events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """The data of each server-sent event, which has one line of it."""
    buffer = bytearray()
    async for piece in pieces:
        buffer += piece
        if len(buffer) > _MAX_BYTES:
            raise AnswerFailed(f"the daemon sent an event of more than {_MAX_BYTES >> 20} MiB")
        *whole, rest = bytes(buffer).split(b"\n\n")
        buffer[:] = rest
        for event in whole:
            if event.startswith(b"data: "):
                yield event.removeprefix(b"data: ").decode(errors="replace")


def _read_event(event: str, figures: Figures) -> str:
    """The text that an event brings; what else it says goes into `figures`. Raises AnswerFailed."""
    value = _parsed(event.encode())
    if not isinstance(value, dict):
        raise AnswerFailed(f"the daemon sent an event that is not a JSON object: {event[:100]!r}")
    if "error" in value:
        raise AnswerFailed(_message(value))
    try:
        if value.get("usage"):
            figures.tokens = int(value["usage"]["completion_tokens"])
        if "peerd" in value:
            figures.chain, figures.failovers = list(value["peerd"]["chain"]), int(value["peerd"]["failovers"])
        for choice in value["choices"]:
            figures.finish = choice["finish_reason"] or figures.finish
            return str(choice["delta"].get("content") or "")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AnswerFailed(f"the daemon sent an event that peerd chat does not know: {error!r}") from None
    return ""


def _refused(status: int, value: Any) -> PeerdError:
    kind = AnswerRefused if 400 <= status < 500 and status != 429 else AnswerFailed
    return kind(_message(value) if isinstance(value, dict) else f"the daemon answered {status}")


def _message(value: dict[str, Any]) -> str:
    error = value.get("error")
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None

"""Asks the daemon on this machine a question: one GET with HTTP/1.0 over its unix socket, which needs no token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import trio

from peerd.protocol.errors import InvalidRequest, Unresponsive

DEADLINE_S = 10.0
_MAX_ANSWER_BYTES = 16 * 1024 * 1024
_REFUSED = re.compile(rb"HTTP/\S+ 4[0-9]{2}")


class NoDaemon(InvalidRequest):
    """No daemon listens on the socket."""


async def ask_daemon(path: Path, question: str) -> dict[str, Any]:
    """The answer of the daemon at a socket to `question`, a path of the local API that answers with a JSON object.

    Raises NoDaemon if none listens, InvalidRequest with its words if it refuses, and Unresponsive if it is silent or
    answers anything else.
    """
    try:
        with trio.fail_after(DEADLINE_S):
            async with await trio.open_unix_socket(path) as stream:
                await stream.send_all(f"GET {question} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                answer = bytearray()
                async for chunk in stream:
                    answer += chunk
                    if len(answer) > _MAX_ANSWER_BYTES:
                        break
    except (OSError, trio.BrokenResourceError) as error:
        if isinstance(error, PermissionError):
            raise InvalidRequest(f"{path} belongs to another user, as whom its daemon runs") from None
        raise NoDaemon(
            f"no peerd listens on {path}: start one with peerd --client, or wait until it has joined its swarm"
        ) from None
    except trio.TooSlowError:
        raise Unresponsive(f"the daemon on {path} did not answer within {DEADLINE_S:g} s") from None
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    found = _json_object(body)
    if _REFUSED.match(head) and found is not None and isinstance(found.get("error"), dict):
        raise InvalidRequest(str(found["error"].get("message")))
    if b" 200 " not in head.partition(b"\r\n")[0] + b" ":
        raise Unresponsive(f"the daemon on {path} answered {head[:100]!r}")
    if found is None:
        raise Unresponsive(f"the daemon on {path} answered no JSON object: {body[:100]!r}")
    return found


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

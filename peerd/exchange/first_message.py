"""Reads the message that opens a stream: it has no body, and must come within ten seconds.

Each stream that a peer opens costs us a task and buffers, so a stream on which nothing comes is ended.
"""

from __future__ import annotations

from typing import TypeVar

import trio

from peerd.net.stream import Stream
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import Unresponsive

M = TypeVar("M", bound=Message)

# The opener sends this message together with the OPEN frame. On a slow line bulk data may come first; 10 s are enough
# for that.
FIRST_MESSAGE_S = 10.0


async def first_message(stream: Stream, kinds: tuple[type[M], ...]) -> M:
    """The first message, one of `kinds`. Raises Unresponsive if it does not come in time, and the errors of
    `Stream.receive`.
    """
    with trio.move_on_after(FIRST_MESSAGE_S):
        return parse((await stream.receive()).header, kinds)
    raise Unresponsive(f"the peer opened a stream and sent nothing on it within {FIRST_MESSAGE_S:g} s")

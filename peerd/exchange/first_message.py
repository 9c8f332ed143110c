"""The message that opens a stream: it has no body, and it comes at once or not at all.

Each stream that a peer opens costs a task and buffers, so one on which nothing is said ends after ten seconds.
"""

from __future__ import annotations

from typing import TypeVar

import trio

from peerd.net.stream import Stream
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import Unresponsive

M = TypeVar("M", bound=Message)

# Its opener sends it with the OPEN. A slow line may carry bulk before it, which 10 s are enough for.
FIRST_MESSAGE_S = 10.0


async def first_message(stream: Stream, kinds: tuple[type[M], ...]) -> M:
    """The first message, one of `kinds`. Raises Unresponsive where it does not come, and as `Stream.receive`."""
    with trio.move_on_after(FIRST_MESSAGE_S):
        return parse((await stream.receive()).header, kinds)
    raise Unresponsive(f"nothing was said on the stream within {FIRST_MESSAGE_S:g} s")

"""Ends a stream: sends the reason of a refusal, and finishes the stream within a bounded time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import trio

from peerd.net.connections import Stream
from peerd.protocol.errors import Overloaded, PeerdError, PeerFault

# How long a peer may take to read the reason. What it has not read by then is dropped; otherwise it could stay in our
# memory for as long as the peer likes.
REFUSAL_DEADLINE_S = 2.0


class Message(Protocol):
    """A message whose fields can be sent as a header."""

    def to_header(self) -> dict[str, Any]:
        """The fields as they travel."""


async def refuse(stream: Stream, describe: Callable[[PeerdError], Message], error: PeerdError) -> None:
    """Send the message that `describe` makes of the error, and finish the stream. Does nothing if the peer is gone."""
    with trio.move_on_after(REFUSAL_DEADLINE_S), suppress(PeerFault, trio.ClosedResourceError):
        await stream.send(describe(error).to_header())
    await finish(stream)


async def finish(stream: Stream) -> None:
    """Finish the stream; reset it if the peer does not read the rest in time."""
    with suppress(PeerFault, trio.ClosedResourceError):
        stream.finish()
        with trio.move_on_after(REFUSAL_DEADLINE_S):
            await stream.wait_unsent_below(1)
            return
        stream.reset(Overloaded.code)

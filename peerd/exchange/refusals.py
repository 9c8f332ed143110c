"""The last words on a stream: why a request was refused, and the stream's end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import trio

from peerd.net.connections import Stream
from peerd.protocol.errors import Overloaded, PeerdError, PeerFault

# How long a peer may take to read why it was refused. What it has not read by then is dropped, or it would stay in
# memory for as long as the peer likes.
REFUSAL_DEADLINE_S = 2.0


class Message(Protocol):
    """Anything that is sent as a header."""

    def to_header(self) -> dict[str, Any]:
        """Its fields, as they travel."""


async def refuse(stream: Stream, describe: Callable[[PeerdError], Message], error: PeerdError) -> None:
    """Send what `describe` makes of the error, and finish the stream. The peer may be gone already."""
    with trio.move_on_after(REFUSAL_DEADLINE_S), suppress(PeerFault, trio.ClosedResourceError):
        await stream.send(describe(error).to_header())
    await finish(stream)


async def finish(stream: Stream) -> None:
    """Finish the stream; reset it where the peer does not read in time what is left to send."""
    with suppress(PeerFault, trio.ClosedResourceError):
        stream.finish()
        with trio.move_on_after(REFUSAL_DEADLINE_S):
            await stream.wait_unsent_below(1)
            return
        stream.reset(Overloaded.code)

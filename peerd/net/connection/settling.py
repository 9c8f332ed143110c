"""Lets two peers agree on which connection they keep, and exchanges their hellos on it.

Two peers may dial each other at the same moment, or one may dial again because it lost a connection that the other
still believes in. So the peer with the smaller PeerId chooses. It sends its hello on the connection that it takes,
before anything else is sent there, and closes the others as duplicates (spec/connection/connection.md).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.stream import Stream
from peerd.protocol.connection.hello import HELLO_PROTOCOL, Hello
from peerd.protocol.errors import HandshakeFailed, RemoteProtocolError

# The time from the proof of the peer's identity until both sides have each other's hello.
SETTLE_S = 10.0


@contextmanager
def within_settle_time() -> Iterator[None]:
    """Limit the block to SETTLE_S. Raises HandshakeFailed if it takes longer."""
    with trio.move_on_after(SETTLE_S) as scope:
        yield
    if scope.cancelled_caught:
        raise HandshakeFailed(f"the peer sent no hello within {SETTLE_S:g} s")


async def agree(connection: PeerConnection, choose: Callable[[PeerConnection], Awaitable[bool]]) -> bool:
    """Agree on this connection. Returns whether both sides take it; if not, it has ended.

    choose: called where the choice is ours; returns whether we take it. If the choice is the peer's, its hello is the
        choice.
    """
    if not connection.is_our_choice:
        await connection.agreement.wait_greeted()
    elif not await choose(connection):
        connection.close_as_duplicate()
    # The connection may have ended in the tick in which we chose, so that no checkpoint has raised yet.
    return connection.lost is None


async def exchange_hellos(connection: PeerConnection, ours: Hello) -> Hello:
    """Send our hello, and return what the peer says about itself. Raises PeerFault."""
    if not connection.is_our_choice:
        stream = await connection.agreement.wait_greeted()
    else:
        stream = connection.open_stream(HELLO_PROTOCOL)
    stream.send_nowait(ours.to_header())
    return await _receive_hello(stream)


async def _receive_hello(stream: Stream) -> Hello:
    try:
        message = await stream.receive()
    except trio.EndOfChannel:
        raise RemoteProtocolError("the peer finished the hello stream without a hello") from None
    hello = Hello.from_header(message.header)
    stream.finish()
    return hello

"""Two peers agree which connection they keep, and say hello on it.

Two peers may dial each other at the same moment, or one dials again because it lost a connection that the other still
believes in. The peer with the smaller PeerId chooses. It says hello on the connection that it takes, and nothing else
is said before; it closes the others as duplicates (spec/connection.md).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from peerd.net.peer_connection import PeerConnection
from peerd.net.stream import Stream
from peerd.protocol.connection.hello import HELLO_PROTOCOL, Hello
from peerd.protocol.errors import HandshakeFailed, RemoteProtocolError

# From the proof of who the peer is until both sides know each other's hello.
SETTLE_S = 10.0


@contextmanager
def within_settle_time() -> Iterator[None]:
    """Settle in the block. Raises HandshakeFailed if that takes too long."""
    with trio.move_on_after(SETTLE_S) as scope:
        yield
    if scope.cancelled_caught:
        raise HandshakeFailed(f"the peer did not say hello within {SETTLE_S:g} s")


async def agree(connection: PeerConnection, choose: Callable[[PeerConnection], Awaitable[bool]]) -> bool:
    """Whether both sides take this connection. If not, it has ended.

    choose: whether we take it, asked where the choice is ours. The peer's choice arrives as its hello.
    """
    if not connection.is_our_choice:
        await connection.wait_greeted()
    elif not await choose(connection):
        connection.close_as_duplicate()
    # It may have ended in the tick in which we chose: then no checkpoint has told us.
    return connection.lost is None


async def exchange_hellos(connection: PeerConnection, ours: Hello) -> Hello:
    """Say hello, and return what the peer says about itself. Raises PeerFault."""
    if not connection.is_our_choice:
        stream = await connection.wait_greeted()
    else:
        stream = connection.open_stream(HELLO_PROTOCOL)
    stream.send_nowait(ours.to_header())
    return await _receive_hello(stream)


async def _receive_hello(stream: Stream) -> Hello:
    try:
        message = await stream.receive()
    except trio.EndOfChannel:
        raise RemoteProtocolError("the peer finished its hello without saying it") from None
    hello = Hello.from_header(message.header)
    stream.finish()
    return hello

"""How far the two ends of a connection have come towards using it: the proof, the choice, the hellos.

`settling` takes these steps; here tasks wait for them.
"""

from __future__ import annotations

import trio

from peerd.net.stream import Stream
from peerd.protocol.connection.hello import Hello


class Agreement:
    """The steps of one connection, in this order: proven, greeted (where the choice is the peer's), settled, and the
    peer's hello.
    """

    def __init__(self) -> None:
        self.is_settled = False
        """Whether both sides have taken this connection."""
        self.greeting: Stream | None = None
        """The stream on which the peer sends its hello; None before, and where we open that stream."""
        self.hello: Hello | None = None
        """What the peer says about itself; None before."""
        self.proven = trio.Event()
        """Set once the peer has proved its identity."""
        self._greeted = trio.Event()
        self._settled = trio.Event()
        self._said_hello = trio.Event()

    def greet(self, stream: Stream) -> None:
        """Note the stream of the peer's hello: the peer takes this connection."""
        self.greeting = stream
        self._greeted.set()

    def settle(self) -> None:
        """Note that both sides take this connection: from now on both may open streams."""
        self.is_settled = True
        self._settled.set()

    def introduce(self, hello: Hello) -> None:
        """Note what the peer says about itself."""
        self.hello = hello
        self._said_hello.set()

    def end(self) -> None:
        """Let the tasks that wait for the peer's hello see that the connection has ended."""
        self._said_hello.set()

    async def wait_greeted(self) -> Stream:
        """Wait for the stream of the peer's hello."""
        await self._greeted.wait()
        assert self.greeting is not None
        return self.greeting

    async def wait_settled_if_greeted(self) -> None:
        """Wait until the streams behind the peer's hello find the connection settled here."""
        if self.greeting is not None and not self.is_settled:
            await self._settled.wait()

    async def wait_hello(self) -> Hello | None:
        """The peer's hello, which comes a moment after the handshake; None if the connection ends before."""
        await self._said_hello.wait()
        return self.hello

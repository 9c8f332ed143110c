"""The open streams of one connection, by number: it passes the machine's events to them, and notes since when none is
open.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from peerd.net.handlers import StreamHandler, run_handler
from peerd.net.stream import Carrier, Stream
from peerd.protocol.connection import streams
from peerd.protocol.connection.events import MessageSent, StreamEnded, StreamReadable


class OpenStreams:
    """The streams that either side opened, and the handlers that run for the peer's."""

    def __init__(self) -> None:
        self.opened = 0
        """How many streams there ever were."""
        self.handled = 0
        """How many streams have a handler that runs now."""
        self._open: dict[int, Stream] = {}
        self._used_at = trio.current_time()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def unused_since(self) -> float | None:
        """When the last stream ended, or `touch` was called; None while a stream is open or a handler runs."""
        return None if self._open or self.handled else self._used_at

    def touch(self) -> None:
        """Note that the connection was used just now."""
        self._used_at = trio.current_time()

    def add(self, connection: Carrier, core: streams.StreamMachine) -> Stream:
        """Add the stream whose machine is `core`, and return it."""
        stream = self._open[core.id] = Stream(connection, core)
        self.opened += 1
        return stream

    def deliver(self, event: StreamReadable | MessageSent | StreamEnded) -> None:
        """Wake the tasks that wait for the event."""
        match event:
            case StreamReadable(core):
                if (stream := self._open.get(core.id)) is not None:
                    stream.wake_receiver()
            case MessageSent(core):
                if (stream := self._open.get(core.id)) is not None:
                    stream.wake_sender()
            case StreamEnded(core):
                if (stream := self._open.pop(core.id, None)) is not None:
                    self.touch()
                    stream.wake()

    def wake_all(self) -> None:
        """Let every task that waits on a stream see that the connection has ended."""
        for stream in self._open.values():
            stream.wake()

    async def run_handler(self, handler: StreamHandler, stream: Stream, on_bug: Callable[[Exception], None]) -> None:
        """Run one handler, counted in `handled` since it was admitted."""
        try:
            await run_handler(handler, stream, on_bug)
        finally:
            self.handled -= 1
            self.touch()

"""Watches the stream beneath a websocket: it reports the end, and ends a stream on which too much comes to nothing.

trio-websocket does not tell the task that waits for the upgrade when the other side hangs up, and reads a refusal's
body, or empty parts of one message, for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

# The limit for a peer's HTTP before the websocket is open, and then for what comes before its first message is whole:
# each has a few hundred bytes.
_MAX_UPGRADE_BYTES: Final = 64 * 1024
# The limit for what comes between two whole messages. The library's queue, its buffer and one message that has begun
# take 0.6 MiB. A message may come in any number of empty parts, each of which costs the library as much as a full one.
_MAX_BETWEEN_BYTES: Final = 1024 * 1024


class WatchedStream(trio.abc.Stream):
    """`stream`, watched: `on_end` is called when it ends.

    It also ends when too many bytes came without progress: `progress` returns 0 until the websocket is open, then 1
    and one more for each whole message.
    """

    def __init__(self, stream: trio.abc.Stream, on_end: Callable[[], None], progress: Callable[[], int]) -> None:
        self._stream = stream
        self._on_end = on_end
        self._progress = progress
        self._last_progress = 0
        self._bytes = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._on_end()
            raise
        progress = self._progress()
        if progress != self._last_progress:
            self._last_progress, self._bytes = progress, 0
        self._bytes += len(data)
        if self._bytes > (_MAX_UPGRADE_BYTES if progress <= 1 else _MAX_BETWEEN_BYTES):
            self._on_end()
            return b""
        if not data:
            self._on_end()
        return data

    async def aclose(self) -> None:
        self._on_end()
        await self._stream.aclose()

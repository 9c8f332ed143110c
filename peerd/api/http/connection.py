"""One HTTP/1.1 connection of the local API, over hypercorn's protocol code.

Programs leave connections open, stop reading, or close them without a word. None of that may hold what a request holds:
a file descriptor of ours, a session on other people's servers. So the connection ends as soon as the client closes it,
when it is idle for too long, and when the client reads nothing for too long.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

# For a client that opened a connection and sends no request, or no other one.
IDLE_S = 60.0
# A client that takes nothing of what we write for this long is gone, or its user has suspended it.
WRITE_S = 30.0
# After the last response of a connection, what the client still sends is read and dropped for this long. Otherwise the
# system would answer it with a reset, which may delete the response before the client has read it.
LINGER_S = 2.0
_READ_BYTES = 65536
# A client is slow, but reads, if it takes this much within WRITE_S.
_WRITE_BYTES = 65536
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}

Address = tuple[str, int] | None


class Connection:
    """One client's connection. `run` serves it until either side ends it; cancelling `run` cuts it off."""

    def __init__(
        self,
        app: Any,
        config: Config,
        context: WorkerContext,
        stream: trio.abc.HalfCloseableStream,
        client: Address = None,
        server: Address = None,
    ) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._stream = stream
        self._addresses = (client, server)
        self._sending = trio.Lock()
        self._idle = trio.CancelScope(deadline=trio.current_time() + IDLE_S)
        #: Since when it has had no request, or None while one is served.
        self.idle_since: float | None = trio.current_time()
        # We have sent our last byte, and drop what the client still sends.
        self._is_over = False
        self._protocol: H11Protocol

    def __repr__(self) -> str:
        return f"<Connection {'over' if self._is_over else 'busy' if self.idle_since is None else 'idle'}>"

    def end(self) -> None:
        """Close the connection. For one that is idle, which loses nothing by it."""
        self._idle.cancel()

    async def run(self) -> None:
        """Serve requests until the client closes the connection, or a deadline passes."""
        try:
            async with TaskGroup() as tasks:
                state = ConnectionState({})
                self._protocol = _Http(
                    self._app, self._config, self._context, tasks, state, False, *self._addresses, self._send
                )
                tasks.spawn(self._watch)
                await self._read()
                self.end()
        finally:
            await trio.aclose_forcefully(self._stream)

    async def _watch(self) -> None:
        """Close the stream when it has been idle for too long, or `end` is called. The reader then ends too."""
        with self._idle:
            await trio.sleep_forever()
        await trio.aclose_forcefully(self._stream)

    async def _read(self) -> None:
        data = None
        while data != b"":
            try:
                data = bytes(await self._stream.receive_some(_READ_BYTES))
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                break
            if not self._is_over:
                await self._protocol.handle(RawData(data))
        await self._protocol.handle(Closed())

    async def _send(self, event: Event) -> None:
        """Do what the protocol asks for: send bytes, close, or note that a request has begun or ended."""
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            await self._say_goodbye()
        elif isinstance(event, Updated):
            self._note_idleness(IDLE_S if event.idle else None)

    def _note_idleness(self, limit_s: float | None) -> None:
        now = trio.current_time()
        self.idle_since = None if limit_s is None else now
        self._idle.deadline = math.inf if limit_s is None else now + limit_s

    async def _write(self, data: bytes) -> None:
        try:
            async with self._sending:
                for offset in range(0, len(data), _WRITE_BYTES):
                    with trio.fail_after(WRITE_S):
                        await self._stream.send_all(data[offset : offset + _WRITE_BYTES])
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            await trio.aclose_forcefully(self._stream)
            await self._protocol.handle(Closed())
        except trio.Cancelled:
            # The client has half of what we wrote, and could not make sense of what follows.
            await trio.aclose_forcefully(self._stream)
            raise

    async def _say_goodbye(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._note_idleness(LINGER_S)
        try:
            async with self._sending:
                await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except trio.Cancelled:
            await trio.aclose_forcefully(self._stream)
            raise
        await self._protocol.handle(Closed())


class _Http(H11Protocol):
    """Hypercorn's HTTP/1.1, without its ways into HTTP/2, and with the reason phrases that some programs print."""

    async def _check_protocol(self, event: h11.Request) -> None:
        pass

    async def _send_h11_event(self, event: Any) -> None:
        if isinstance(event, h11.Response):
            reason = _PHRASES.get(event.status_code, b"")
            event = h11.Response(status_code=event.status_code, headers=event.headers, reason=reason)
        await super()._send_h11_event(event)

"""A session of the daemon, with the interface of `peerd.client.session.Session`, a session of this process.

It also keeps the rows' inputs. If the session ends, with the daemon or because a call was cancelled half-way, its user
opens another session and sends them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import trio

from peerd.client.session.step_log import StepLog
from peerd.local.channel import Channel, Parameters, open_channel
from peerd.local.messages import MAX_WAITING, LocalOpen, SessionOpened
from peerd.protocol.errors import InvalidRequest, PeerdError
from peerd.protocol.messages.session import Output, Want
from peerd.protocol.rows import Op, RowSlice, SessionSize

# How many positions a message has: 128 MiB of the widest models' float32.
_POSITIONS_AT_ONCE = 2048


class DaemonSession:
    """Runs steps in a session of the daemon. `run` owns its websocket. `hidden` is `[positions, width]`."""

    def __init__(self, path: Path, wanted: LocalOpen, parameters: Parameters, width: int) -> None:
        self.log = StepLog(SessionSize(wanted.max_length, wanted.max_rows, wanted.max_rollback))
        self._path = path
        self._wanted = wanted
        self._parameters = parameters
        self._width = width
        self._channel: Channel | None = None
        self._sending = trio.Lock()
        self._window = trio.CapacityLimiter(MAX_WAITING)
        self._scope = trio.CancelScope()
        self._closed = False
        self._error: Exception = trio.ClosedResourceError("the session was closed")

    def __repr__(self) -> str:
        return f"<DaemonSession {self._path} {'closed' if self._closed else self.log}>"

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._closed

    def close(self) -> None:
        """End the session on every hop."""
        self._closed = True
        self._scope.cancel()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the session open until `close`. Raises the daemon's errors until it is open."""
        try:
            with self._scope:
                async with open_channel(self._path) as channel:
                    await channel.open(self._wanted, self._parameters)
                    await channel.receive(SessionOpened)
                    self._channel = channel
                    task_status.started()
                    while True:
                        output, body = await channel.receive(Output)
                        self.log.answer(output, body, self._width)
        except PeerdError as error:
            if self._channel is None:
                raise
            self._error = error
        finally:
            self._closed = True
            self.log.fail(self._error)

    async def step(
        self,
        hidden: torch.Tensor,
        *,
        row: int = 0,
        start: int | None = None,
        rows: Sequence[RowSlice] | None = None,
        ops: Sequence[Op] = (),
        want: Want = "last",
    ) -> torch.Tensor:
        """Run a step as `Session.step` does. A call that fails or is cancelled ends the session, because its state is
        then unknown.

        Raises InvalidRequest, ContextTooLong, NoChain, Overloaded, ConnectionLost, trio.ClosedResourceError.
        """
        slices = self.log.slices(hidden, row, start, rows)
        if not hidden.isfinite().all():
            raise InvalidRequest("hidden has values that are not finite")
        self.log.check(hidden, slices, ops)
        if len(slices) != 1 or slices[0].count <= _POSITIONS_AT_ONCE:
            return await self._step(hidden, slices, ops, want)
        whole, results = slices[0], []
        for offset in range(0, whole.count, _POSITIONS_AT_ONCE):
            part = hidden[offset : offset + _POSITIONS_AT_ONCE]
            piece = RowSlice(whole.row, whole.start + offset, len(part))
            results.append(await self._step(part, (piece,), () if offset else ops, want))
        return torch.cat(results) if want == "all" else results[-1]

    async def _step(
        self, hidden: torch.Tensor, rows: tuple[RowSlice, ...], ops: Sequence[Op], want: Want
    ) -> torch.Tensor:
        async with self._window:
            try:
                async with self._sending:
                    if self._closed or self._channel is None:
                        raise self._error
                    pending = self.log.add(hidden, rows, ops, want, 0)
                    tensors = {"tensor": hidden} if len(hidden) else {}
                    await self._channel.send(pending.step, **tensors)
                await pending.done.wait()
            except BaseException:
                self.close()
                raise
        return pending.outcome()

"""Serves clients that train a copy of our own blocks, where our operator allows it (spec/training/span-training.md).

Each client has one stream, whose requests `span_training` answers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from peerd.exchange.first_message import first_message
from peerd.exchange.refusals import refuse
from peerd.net.connections import Stream
from peerd.net.limits.owners import Owner
from peerd.protocol.errors import (
    BadResult,
    Draining,
    InternalError,
    PeerdError,
    PeerFault,
    RemoteProtocolError,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.span_training import SpanBegin, SpanFailure
from peerd.server.engine_task import EngineTask
from peerd.server.training.span_training import Copy, SpanTraining

CopyOpener = Callable[[PeerId, SpanBegin], AbstractAsyncContextManager[Copy]]
"""Opens a client's copy. Raises NotServed, Draining, UnsupportedFeature, Overloaded, InvalidRequest."""


class SpanTrainings:
    """Answers streams: `handle` goes to the connections. Nobody may train before `attach`."""

    def __init__(self) -> None:
        self._open: CopyOpener | None = None
        self._running: dict[SpanTraining, trio.CancelScope] = {}
        self._ended = trio.lowlevel.ParkingLot()

    def attach(self, open_copy: CopyOpener) -> None:
        """Train the copies that this opens."""
        self._open = open_copy

    async def end(self, task: EngineTask) -> None:
        """End the trainings beside a span that leaves. Waits for the turn that is running."""
        while scopes := [scope for training, scope in self._running.items() if training.task is task]:
            for scope in scopes:
                scope.cancel()
            await self._ended.park()

    async def handle(self, stream: Stream) -> None:
        """Serve one client's training, from its `begin` to its end."""
        try:
            await self._serve(stream)
        except (trio.EndOfChannel, trio.ClosedResourceError):
            # The client has finished.
            stream.reset("closed")
        except PeerFault as error:
            if isinstance(error, RemoteProtocolError | BadResult | InternalError):
                await refuse(stream, SpanFailure.of, error)
        except PeerdError as error:
            await refuse(stream, SpanFailure.of, error)

    async def _serve(self, stream: Stream) -> None:
        begin = await first_message(stream, (SpanBegin,))
        if begin.needs:
            raise UnsupportedFeature(f"this peer lacks {', '.join(begin.needs)} in training its blocks")
        if self._open is None:
            raise UnsupportedFeature("this peer's blocks are not for training: it was started without --trainable")
        owner = Owner.at(stream.peer, stream.connection.accountable_ip)
        async with self._open(stream.peer, begin) as copy:
            training = SpanTraining(stream, owner, copy)
            with trio.CancelScope() as scope:
                self._running[training] = scope
                try:
                    await training.run()
                finally:
                    del self._running[training]
                    training.drop_all()
                    self._ended.unpark_all()
        if scope.cancelled_caught:
            raise Draining("this peer no longer serves these blocks")

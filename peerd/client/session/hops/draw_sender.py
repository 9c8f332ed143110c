"""Tells the last hop of a session how to draw tokens from its steps.

The hop remembers what it was told, so a token of an answer costs a few bytes. A new last hop is told everything again
that the answers still missing depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from peerd.client.session.hops.control_stream import ControlStream
from peerd.compute.prefixes import common_length
from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import PeerFault
from peerd.protocol.messages.drawing import Draw, Sampling, pack_ids
from peerd.protocol.rows import RowSlice


@dataclass(frozen=True, slots=True)
class DrawRequest:
    """What is to be drawn from a step's results.

    contexts: for each row that is drawn from, its tokens up to the step's last position; empty if the draws do not
        depend on them. rows: draw for each of these rows after the step's only wanted position. vocab_size: how many
        token ids there are.
    """

    sampling: Sampling
    vocab_size: int
    contexts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    rows: tuple[int, ...] = ()


class DrawSender:
    """Sends the requests of one session, each step's once to each last hop."""

    def __init__(self) -> None:
        self._hop: ControlStream | None = None
        self._sent = 0
        self._sampling: Sampling | None = None
        self._contexts: dict[int, list[int]] = {}

    def __repr__(self) -> str:
        return f"<DrawSender {self._hop} sent={self._sent}>"

    def send(self, hop: ControlStream, requests: Sequence[tuple[int, DrawRequest]]) -> None:
        """Send what `hop` was not told yet of `requests`, which come with the numbers of their steps, in order.

        If the hop is gone, the task that reads it reports that.
        """
        if hop is not self._hop:
            self._hop, self._sent, self._sampling = hop, 0, None
            self._contexts.clear()
        for seq, request in requests:
            if seq > self._sent:
                self._sent = seq
                with suppress(PeerFault, trio.ClosedResourceError):
                    self._send(hop, seq, request)

    def _send(self, hop: ControlStream, seq: int, request: DrawRequest) -> None:
        if request.sampling != self._sampling:
            hop.send_nowait(request.sampling, priority=Priority.DECODE)
            self._sampling = request.sampling
        slices: list[RowSlice] = []
        ids: list[int] = []
        for row, context in request.contexts.items():
            told = self._contexts.setdefault(row, [])
            start = common_length(told, context, likely=len(told))
            if start < len(context):
                slices.append(RowSlice(row, start, len(context) - start))
                ids += context[start:]
                told[start:] = context[start:]
        body = [memoryview(pack_ids(ids))] if ids else []
        hop.send_nowait(Draw(seq=seq, context=tuple(slices), rows=request.rows), body, priority=Priority.DECODE)

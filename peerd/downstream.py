"""The way from one hop to the next: one link at a time, with what was computed before it stood.

Knows tickets only as bytes to show; knows no engine. The difficulty is the change of route in mid-flight:
a new epoch throws away what was queued for the old link, replays what the new next hop lacks, and only
then tells the client, which sends everything unanswered again (spec/session.md, "When a hop dies").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import torch
import trio

from peerd.connections import Stream
from peerd.protocol.errors import CallerError, LinkFailed, PeerFault
from peerd.protocol.frames import Priority
from peerd.protocol.messages import Failure, LinkDown, Linked, NextHop, Routed, Step
from peerd.protocol.schema import Message, parse
from peerd.retained import Retained
from peerd.step_tensors import encoded, priority_of, replay_steps

OpenLink = Callable[[NextHop], AbstractAsyncContextManager[tuple[Stream, Linked]]]
"""Dials the next hop, shows the ticket, yields the link and its answer. Raises LinkFailed."""

_Encoded = tuple[int, dict[str, Any], list[memoryview], Priority]


class Downstream:
    """Pushes a session's results to its next hop. `report` tells the client; it must not block."""

    def __init__(
        self, codec: str, dtype: torch.dtype, retained: Retained, open_link: OpenLink, report: Callable[[Message], None]
    ) -> None:
        self._codec = codec
        self._dtype = dtype
        self._retained = retained
        self._open_link = open_link
        self._report = report
        self._link: Stream | None = None
        self._backlog: deque[_Encoded] = deque()
        self._route = trio.CancelScope()
        self._standing = trio.Event()
        self.next_have: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<Downstream {self._link or 'no link'} unsent={self.unsent}>"

    @property
    def unsent(self) -> int:
        """Results not yet on the wire."""
        return len(self._backlog) if self._link is None else self._link.unsent_messages

    async def wait_unsent_at_most(self, count: int) -> None:
        """Wait until so few results are unsent. Returns early where the link goes down."""
        while self._link is None:
            if self.unsent <= count:
                return
            await self._standing.wait()
        try:
            await self._link.wait_unsent_below(count + 1)
        except (PeerFault, trio.ClosedResourceError):
            return

    async def wait_standing(self) -> None:
        """Wait until a link stands."""
        await self._standing.wait()

    def push(self, step: Step, hidden: torch.Tensor) -> None:
        """Queue one result, `[positions, width]`, for the next hop. Never blocks."""
        header, body = encoded(step, hidden, self._codec, self._dtype)
        priority = priority_of(step.positions)
        if self._link is None:
            self._backlog.append((step.epoch, header, body, priority))
            return
        # Whoever follows the link reports its end; the client then sends this step again.
        with suppress(PeerFault, trio.ClosedResourceError):
            self._link.send_nowait(header, body, priority=priority)

    async def follow(self, epoch: int, next_hop: NextHop, *, replay: bool) -> None:
        """Open the link of a route and stay until it ends or another route supersedes it."""
        self._route.cancel()
        self._route = trio.CancelScope()
        self._unlink()
        while self._backlog and self._backlog[0][0] < epoch:
            self._backlog.popleft()
        with self._route:
            try:
                async with self._open_link(next_hop) as (link, linked):
                    await self._use(link, linked, epoch, replay)
            # CallerError: what was kept for the replay does not fit the codec.
            except (LinkFailed, PeerFault, CallerError) as error:
                self._report(LinkDown(epoch=epoch, message=str(error)[:500]))

    async def _use(self, link: Stream, linked: Linked, epoch: int, replay: bool) -> None:
        self.next_have = dict(linked.have)
        if replay:
            await self._replay(link, linked, epoch)
        while self._backlog:
            _, header, body, priority = self._backlog.popleft()
            link.send_nowait(header, body, priority=priority)
        self._link = link
        self._standing.set()
        try:
            # The next hop only ever speaks to say why it ends the link.
            said = parse((await link.receive()).header, (Failure,))
        except trio.EndOfChannel:
            raise LinkFailed("the next hop ended the link") from None
        finally:
            if self._link is link:
                self._unlink()
        raise LinkFailed(f"the next hop ended the link: {said.error}")

    async def _replay(self, link: Stream, linked: Linked, epoch: int) -> None:
        have, push_from = dict(linked.have), dict(linked.next_have)
        replayed = 0
        for step, hidden in replay_steps(self._retained, have, push_from, epoch):
            header, body = encoded(step, hidden, self._codec, self._dtype)
            await link.send(header, body, priority=priority_of(step.positions))
            replayed += step.positions
        kept_from = tuple((row, 0) for row in sorted(self._retained.lengths))
        self._report(Routed(epoch=epoch, replayed=replayed, kept_from=kept_from))

    def _unlink(self) -> None:
        if self._link is not None:
            self._link = None
            self._standing = trio.Event()

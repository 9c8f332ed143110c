"""Decides where a session's results go: to the next hop, to the client as a bridge to it, or, at the last hop, to the
client as answers.

The client chooses by routes, which it numbers by epochs; only a newer one counts.
"""

from __future__ import annotations

import torch

from peerd.net.connections import Stream
from peerd.protocol.errors import BadResult, InvalidRequest, Superseded, UnsupportedFeature
from peerd.protocol.messages.audits import Copy
from peerd.protocol.messages.session import REPLAY_SEQ, Bridge, NextHop, OpenSession, Route, Step
from peerd.server.sessions.answering import Answering
from peerd.server.sessions.downstream import Downstream
from peerd.server.sessions.drawing import Drawing


class Outlet:
    """The way of one session's results. `answers` leads to the client, `down` to the next hop.

    max_steps: how many unanswered steps the client was granted.
    """

    def __init__(self, opening: OpenSession, answers: Answering | Drawing, down: Downstream, max_steps: int) -> None:
        #: The number of the newest route.
        self.epoch = opening.epoch
        self._answers = answers
        self._down = down
        self._max_steps = max_steps
        self._wire_dtype = opening.dtype
        self._is_last = opening.next is None

    def __repr__(self) -> str:
        return f"<Outlet epoch={self.epoch} {self._answers if self._is_last else self._down}>"

    def begin(self, route: Route | Bridge, *, has_begun: bool) -> None:
        """Take a newer route; the caller then runs `follow` or `bridge`. Raises Superseded unless the epoch is new,
        InvalidRequest for a last hop that `has_begun`.
        """
        if route.epoch <= self.epoch:
            raise Superseded(f"route {route.epoch} is not newer than {self.epoch}")
        is_last = isinstance(route, Route) and route.next is None
        if self._is_last and not is_last and has_begun:
            raise InvalidRequest("a last hop keeps no results, so it cannot be given a next one")
        self.epoch = route.epoch
        self._is_last = is_last

    async def follow(self, epoch: int, next_hop: NextHop, asked: bool) -> None:
        """Push results over a link to this next hop, until the link ends or a newer route is up.

        asked: whether the client waits for a message that the route is up.
        """
        await self._down.follow(epoch, next_hop, asked=asked)

    async def bridge(self, bridge: Bridge, control: Stream) -> None:
        """Push results to the client over its control stream, until a newer route is up."""
        await self._down.bridge(bridge.epoch, control, bridge.taken)

    @property
    def is_last(self) -> bool:
        """Whether results go to the client, so that none are kept."""
        return self._is_last

    async def copy(self, copy: Copy) -> None:
        """Send another hop what the next hop was sent so far."""
        await self._down.copy(copy.epoch, copy.next)

    def send(self, step: Step, hidden: torch.Tensor) -> None:
        """Queue a step's result, `[positions, width]`. Raises UnsupportedFeature if the wire's dtype cannot hold it."""
        try:
            if not self._is_last:
                self._down.push(step, hidden)
                # A client has no more unanswered steps than were granted, so all hops have taken every step before
                # those.
                self._down.kept.fold(step.seq - self._max_steps)
            elif step.seq != REPLAY_SEQ:
                self._answers.answer(step, hidden)
        except BadResult as error:
            # The engine's result was finite, so the wire dtype that the client chose cannot hold it.
            raise UnsupportedFeature(f"{error}: {self._wire_dtype} is too narrow for these activations") from None

    @property
    def unsent(self) -> int:
        """How many results are not yet on the wire."""
        return self._answers.unsent if self._is_last else self._down.unsent

    async def wait_unsent_at_most(self, count: int) -> None:
        """Wait until at most `count` results are unsent. Returns early if what they go to ends."""
        if self._is_last:
            await self._answers.wait_unsent_at_most(count)
        else:
            await self._down.wait_unsent_at_most(count)

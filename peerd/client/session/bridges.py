"""Bridges over links that fail between two healthy hops: the client carries what one sends to the other.

Knows who is before and after a link; replaces nobody itself. The difficulty is that a link that fails says nothing
about its ends: so we ask the far one ourselves, blame nobody who answers, and go on looking for a way without us.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import trio

from peerd.client.session.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.opener import ChainOpener
from peerd.exchange.step_tensors import priority_of
from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import PeerdError, PeerFault
from peerd.protocol.messages.session import Bridge, LinkDown, Routed, Step

# The next hop answers us within this, or we cannot bridge its link.
BRIDGE_ASK_S = 2.0
# How seldom we look, in the end, for a way without a bridge.
MAX_REPLAN_S = 300.0


class Keeper(Protocol):
    """What bridges ask of the chain's keeper."""

    @property
    def chain(self) -> LiveChain: ...

    def alarm(self) -> None:
        """There is something to see to."""

    def unreachable(self, control: ControlStream, error: Exception) -> None:
        """We do not reach this hop ourselves."""

    async def replace(self, control: ControlStream, is_still_wanted: Callable[[], bool]) -> bool:
        """Put others in its place, without blame. False where nobody else can be had."""

    async def route(self, upstream: ControlStream, to: ControlStream) -> None:
        """Point a hop to a next hop."""


class Bridges:
    """The bridges of one session's chain. `see_to` does what is due, one thing at a time."""

    def __init__(self, keeper: Keeper, opener: ChainOpener, nursery: trio.Nursery) -> None:
        self._keeper = keeper
        self._opener = opener
        self._nursery = nursery
        # Hops whose link has failed, and those whose bridge may not be needed any more.
        self._broken: set[ControlStream] = set()
        self._doubted: set[ControlStream] = set()

    def __repr__(self) -> str:
        return f"<Bridges broken={len(self._broken)} doubted={len(self._doubted)}>"

    @property
    def any_broken(self) -> bool:
        """Whether something is not carried that should be."""
        return bool(self._broken)

    @property
    def any_doubted(self) -> bool:
        """Whether there may be a way without a bridge."""
        return bool(self._doubted)

    def link_down(self, control: ControlStream, said: LinkDown) -> None:
        """A hop cannot reach its next hop."""
        if said.epoch != control.route_epoch:
            return
        if control.is_bridged:
            # We tried to end a bridge, which stands until a link does.
            control.is_bridge_wanted = True
            self._nursery.start_soon(self._doubt_later, control)
        else:
            self.stuck(control)

    def stuck(self, control: ControlStream) -> None:
        """What a hop sends does not arrive at the next."""
        following = self._keeper.chain.after(control.hop.span.end)
        if control in self._keeper.chain and not control.is_bridged and following is not None:
            self._broken.add(control)
            self._keeper.alarm()

    def routed(self, control: ControlStream, said: Routed) -> None:
        """A link stands where there was a bridge, or a bridge does."""
        if said.epoch == control.route_epoch:
            control.is_bridged = control.is_bridged and control.is_bridge_wanted

    def pass_on(self, control: ControlStream, step: Step, body: memoryview) -> None:
        """We are the bridge between this hop and the next."""
        following = self._keeper.chain.after(control.hop.span.end)
        if not control.is_bridged or following is None:
            return
        # Where the stream breaks, its reader says so.
        with suppress(PeerFault, trio.ClosedResourceError):
            following.send_nowait(step, [body], priority=priority_of(step.positions))

    async def mend(self) -> None:
        """Carry what a hop sends to the next ourselves: neither has done wrong."""
        chain, upstream = self._keeper.chain, self._broken.pop()
        following = chain.after(upstream.hop.span.end)
        if upstream not in chain or upstream.is_bridged or following is None:
            return
        asked_in = upstream.route_epoch
        try:
            with trio.fail_after(BRIDGE_ASK_S):
                taken = (await self._opener.ask(chain, following)).taken
        except (PeerdError, trio.TooSlowError, trio.ClosedResourceError) as error:
            # It cannot be reached from there, nor by us.
            self._keeper.unreachable(following, error)
            return
        if upstream not in chain or chain.after(upstream.hop.span.end) is not following:
            return
        if upstream.route_epoch != asked_in:
            return
        upstream.route_epoch = chain.raise_epoch()
        upstream.is_bridged = upstream.is_bridge_wanted = True
        with suppress(PeerFault, trio.ClosedResourceError):
            upstream.send_nowait(Bridge(epoch=upstream.route_epoch, taken=taken), priority=Priority.CONTROL)
        self._nursery.start_soon(self._doubt_later, upstream)

    async def _doubt_later(self, upstream: ControlStream) -> None:
        await trio.sleep(upstream.replan_after_s)
        upstream.replan_after_s = min(2 * upstream.replan_after_s, MAX_REPLAN_S)
        if upstream in self._keeper.chain and upstream.is_bridged:
            self._doubted.add(upstream)
            self._keeper.alarm()

    async def replan(self) -> None:
        """End a bridge: go through another peer, or else see whether the link can be had again."""
        chain, upstream = self._keeper.chain, self._doubted.pop()
        following = chain.after(upstream.hop.span.end)
        if upstream not in chain or not upstream.is_bridged or following is None:
            return
        if await self._keeper.replace(following, lambda: upstream.is_bridged):
            return
        if upstream in chain and following in chain and upstream.is_bridged:
            await self._keeper.route(upstream, following)
            # Until that stands, what comes is still for us to carry.
            upstream.is_bridged = True

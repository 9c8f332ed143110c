"""Bridges links that fail between two healthy hops: the client carries results from one hop to the next.

A broken link does not show that a hop at either end is broken. So the client asks the downstream hop itself, blames no
peer that answers, and tries again and again to find a route without a bridge. It passes on only what can be a result of
its own steps, because the next hop refuses anything else, and would be blamed for that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from weakref import WeakKeyDictionary

import trio

from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.opener import ChainOpener
from peerd.client.session.step_log import StepLog, decode_result
from peerd.client.session.troubles import BridgeIdle, HopLost, LinkBroken, News
from peerd.exchange.step_tensors import priority_of
from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import BadResult, LinkFailed, PeerdError, PeerFault, RemoteProtocolError
from peerd.protocol.messages.session import Bridge, LinkDown, Routed, Step

# If the downstream hop does not answer us within this, we cannot bridge the link.
BRIDGE_ASK_S = 2.0


class Bridges:
    """Builds and runs the bridges of one session. Timers run in `nursery`; their news goes to `report`."""

    def __init__(
        self, opener: ChainOpener, nursery: trio.Nursery, report: Callable[[News], None], log: StepLog, width: int
    ) -> None:
        self._log = log
        self._width = width
        # When each bridge was built, and the last step that it carried.
        self._built_at: WeakKeyDictionary[ControlStream, float] = WeakKeyDictionary()
        self._carried: WeakKeyDictionary[ControlStream, int] = WeakKeyDictionary()
        self._opener = opener
        self._nursery = nursery
        self._report = report

    def link_down(self, chain: LiveChain, upstream: ControlStream, message: LinkDown) -> None:
        """Handle a hop's message that it cannot reach its next hop."""
        route = chain.route(upstream)
        if message.epoch != route.epoch:
            return
        if route.is_bridged:
            # The client tried to end a bridge. The bridge goes on until a link is up.
            chain.set_route(upstream, replace(route, is_bridge_wanted=True))
            self._look_again_later(chain, upstream)
        else:
            self._report(LinkBroken(upstream))

    def routed(self, chain: LiveChain, upstream: ControlStream, message: Routed) -> None:
        """Handle a hop's message that its route is up: a link that replaces a bridge, or a bridge."""
        route = chain.route(upstream)
        if message.epoch == route.epoch:
            chain.set_route(upstream, replace(route, is_bridged=route.is_bridged and route.is_bridge_wanted))

    def pass_on(self, chain: LiveChain, upstream: ControlStream, step: Step, body: memoryview) -> None:
        """Pass a result on if the client is the bridge between this hop and the next."""
        following = chain.after(upstream.hop.span.end)
        if not chain.route(upstream).is_bridged or following is None:
            return
        try:
            self._check(step, body)
        except (RemoteProtocolError, BadResult) as error:
            self._report(HopLost(upstream, error))
            return
        self._carried[upstream] = max(step.seq, self._carried.get(upstream, 0))
        # If the stream breaks, the task that reads it reports that.
        with suppress(PeerFault, trio.ClosedResourceError):
            following.send_nowait(step, [body], priority=priority_of(step.positions))

    def stuck_at(self, chain: LiveChain, upstream: ControlStream, seq: int, after_s: float) -> ControlStream | None:
        """The hop that keeps step `seq` from getting from `upstream` to the next hop although there is a bridge.

        It is `upstream` if that hop says it is done but gave us nothing, and the next hop if we gave the step to it.
        None while the bridge is younger than `after_s`.
        """
        if trio.current_time() < self._built_at.get(upstream, 0.0) + after_s:
            return None
        return chain.after(upstream.hop.span.end) if self._carried.get(upstream, 0) >= seq else upstream

    def _check(self, step: Step, body: memoryview) -> None:
        """Raise BadResult or RemoteProtocolError for a result that no honest hop makes of our steps."""
        pending = self._log.pending.get(step.seq)
        if pending is not None and (step.rows, step.ops) != (pending.step.rows, pending.step.ops):
            raise BadResult(f"for step {step.seq} it sends rows {step.rows}")
        if step.rows:
            decode_result(step.tensor, body, (step.positions, self._width))

    async def build(self, chain: LiveChain, upstream: ControlStream) -> None:
        """Bridge the link behind `upstream`. If the client cannot reach the next hop either, report that hop as
        lost.
        """
        following = chain.after(upstream.hop.span.end)
        assert following is not None
        asked_in = chain.route(upstream).epoch
        try:
            with trio.fail_after(BRIDGE_ASK_S):
                taken = (await self._opener.ask(chain, following)).taken
        except PeerFault as error:
            self._report(HopLost(following, error))
            return
        except (PeerdError, trio.TooSlowError, trio.ClosedResourceError) as error:
            self._report(HopLost(following, LinkFailed(f"{following.hop.peer_id} cannot be reached: {error}")))
            return
        if upstream not in chain or chain.after(upstream.hop.span.end) is not following:
            return
        route = chain.route(upstream)
        if route.epoch != asked_in:
            return
        route = replace(route, epoch=chain.raise_epoch(), is_bridged=True, is_bridge_wanted=True)
        chain.set_route(upstream, route)
        self._built_at[upstream] = trio.current_time()
        self._carried.pop(upstream, None)
        with suppress(PeerFault, trio.ClosedResourceError):
            upstream.send_nowait(Bridge(epoch=route.epoch, taken=taken), priority=Priority.CONTROL)
        self._look_again_later(chain, upstream)

    def _look_again_later(self, chain: LiveChain, upstream: ControlStream) -> None:
        """Report the bridge as idle after a pause, which doubles each time."""
        route = chain.route(upstream)
        chain.set_route(upstream, route.with_longer_pause())
        self._nursery.start_soon(self._report_idle, upstream, route.replan_after_s)

    async def _report_idle(self, upstream: ControlStream, after_s: float) -> None:
        await trio.sleep(after_s)
        self._report(BridgeIdle(upstream))

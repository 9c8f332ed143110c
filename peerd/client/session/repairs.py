"""The repairs of a session's chain: fills holes, replaces hops, sets routes, and brings new hops up to the newest step.

The supervisor decides which repair is next; one runs at a time. While it runs, hops may die, or the whole chain may be
given up. So each repair looks again at what holds before it puts new hops into the chain.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from peerd.client.session.first_hop import FirstHop
from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.hops.draw_sender import DrawSender
from peerd.client.session.mender import ChainMender
from peerd.client.session.opener import ChainOpener
from peerd.client.session.progress import StepProgress
from peerd.client.session.step_log import StepLog
from peerd.client.session.troubles import BridgeIdle, HopHangs, HopLost, News, still_stands
from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import ConnectionLost, PeerFault
from peerd.protocol.span import Span

log = logging.getLogger(__name__)


class Repairs:
    """Repairs the chain of `progress`.

    read: reads a new hop's messages until its stream ends; runs in `nursery`. report: takes what goes wrong meanwhile.
    leave: ends the session on a hop that is replaced without blame.
    """

    def __init__(
        self,
        progress: StepProgress,
        log: StepLog,
        first: FirstHop,
        mender: ChainMender,
        opener: ChainOpener,
        nursery: trio.Nursery,
        read: Callable[[ControlStream], Awaitable[None]],
        report: Callable[[News], None],
        leave: Callable[[ControlStream], None],
    ) -> None:
        self._progress = progress
        self._log = log
        self._first = first
        self._mender = mender
        self._opener = opener
        self._nursery = nursery
        self._read = read
        self._report = report
        self._leave = leave
        self._draws = DrawSender()

    def __repr__(self) -> str:
        return f"<Repairs of {self._progress.chain}>"

    async def fill(self, hole: Span) -> None:
        """Open hops for these blocks. Raises NumbersUsedUp, and the error that fails the pending steps."""
        chain = self._progress.chain
        controls = await self._mender.fill(chain, hole)
        if chain is not self._progress.chain:
            for control in controls:
                control.close()
            return
        chain.put(Span(hole.start, hole.end), controls)
        await self._adopt(controls)

    async def overtake(self, trouble: HopHangs) -> None:
        """Replace a hop that hangs. If no other peer can be had now, the hop is asked again later."""
        slow = trouble.hop
        log.info("%s hangs in a step for blocks %s", slow.hop.peer_id, slow.hop.span)
        if await self._replace(slow, trouble):
            # If all peers are slow, moving from one to the next would only make it worse: so wait longer from now on.
            self._progress.pace.doubled()

    async def replan(self, trouble: BridgeIdle) -> None:
        """End a bridge: replace the hop that cannot be reached, or else try whether the link works again."""
        chain, upstream = self._progress.chain, trouble.hop
        following = chain.after(upstream.hop.span.end)
        if following is None or await self._replace(following, trouble):
            return
        if upstream in chain and following in chain and chain.route(upstream).is_bridged:
            await self._route(upstream, following, is_bridged=True)

    async def catch_up(self) -> None:
        """Send the first hop, if it is new, everything that was answered and everything submitted after that."""
        progress = self._progress
        head = progress.chain.controls[0]
        try:
            await self._first.bring_up(head, progress.chain.epoch)
        except PeerFault as error:
            self._report(HopLost(head, error))
        except trio.ClosedResourceError:
            self._report(HopLost(head, ConnectionLost(f"the stream to {head.hop.peer_id} has ended")))
        if head not in progress.chain or not progress.chain.is_whole:
            return
        progress.is_ready = True
        progress.has_stood = True
        self._first.send_unsent()
        self.send_draws()
        progress.started()

    def send_draws(self) -> None:
        """Tell the last hop, if it draws tokens, what to draw from the steps that were sent."""
        last = self._progress.chain.controls[-1]
        if last.draws:
            self._draws.send(last, self._log.draws)

    async def _replace(self, hop: ControlStream, why: HopHangs | BridgeIdle) -> bool:
        """Replace an open hop without blame, if `why` still holds when the replacement is open.

        Returns False if no other peer can be had.
        """
        progress = self._progress
        chain, span = progress.chain, hop.hop.span
        if hop not in chain:
            return False
        controls = await self._mender.overtake(chain, span, [hop.hop.peer_id])
        if controls is None:
            return False
        is_wanted = chain is progress.chain and still_stands(why, chain, progress.oldest_seq)
        if not is_wanted or not chain.put(span, controls, self._leave):
            for other in controls:
                other.close()
            return False
        self._mender.candidates.avoid(hop.hop.peer_id, trio.current_time())
        progress.is_ready = False
        await self._adopt(controls)
        return True

    async def _adopt(self, controls: list[ControlStream]) -> None:
        """Read new hops' messages, and make the hop before them push to them."""
        progress = self._progress
        for control in controls:
            self._nursery.start_soon(self._read, control)
        self._measure(controls)
        progress.failovers += progress.has_stood
        if progress.has_stood:
            log.info("replaced by: %s", ", ".join(f"{each.hop.peer_id} for {each.hop.span}" for each in controls))
        progress.replaying = self._log.positions
        before = progress.chain.before(controls[0].hop.span.start)
        if before is not None:
            await self._route(before, controls[0])

    def _measure(self, controls: list[ControlStream]) -> None:
        """Note the delays to new hops, and whether they replace others."""
        connections = self._opener.connections
        for control in controls:
            connection = connections.live.get(control.hop.peer_id)
            if connection is not None and connection.rtt_s is not None:
                connections.meters.hop_delay_s.observe(connection.rtt_s)
        connections.meters.failovers += self._progress.has_stood

    async def _route(self, upstream: ControlStream, to: ControlStream, *, is_bridged: bool = False) -> None:
        """Give a hop a route to its new next hop, to which it sends what that hop lacks.

        is_bridged: whether the client carries the hop's results until the link is up.
        """
        chain = self._progress.chain
        route = chain.route(upstream).direct(chain.raise_epoch(), is_bridged=is_bridged)
        chain.set_route(upstream, route)
        message = await self._opener.route(chain.session, route.epoch, upstream, to)
        # If the stream breaks, the task that reads it reports that.
        with suppress(PeerFault, trio.ClosedResourceError):
            upstream.send_nowait(message, priority=Priority.CONTROL)

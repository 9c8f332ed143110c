"""Sends a session's results to the next hop: over one link at a time, or to the client as a bridge if no link works.

When the route changes in mid-flight, the new next hop must get what it lacks before anything newer, while results keep
coming; and a hop must not be sent what it has already taken (spec/sessions/session.md, "When a hop dies").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress

import torch
import trio

from peerd.exchange.replay_log import AlreadyFolded, ReplayLog, Sent
from peerd.exchange.step_tensors import encoded, priority_of
from peerd.meters import Meters
from peerd.net.connections import Stream
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import CallerError, LinkFailed, PeerFault
from peerd.protocol.messages.session import REPLAY_SEQ, Failure, Gap, LinkDown, Linked, NextHop, Routed, Step

# How long a copy for an audit may take. Meanwhile the log keeps every step, so it is no longer than that.
COPY_S = 30.0

OpenLink = Callable[[NextHop], AbstractAsyncContextManager[tuple[Stream, Linked]]]
"""Dials the next hop, shows the ticket, and yields the link and the hop's answer. Raises LinkFailed."""


class Downstream:
    """Keeps a session's results and pushes them to its next hop. `report` sends a message to the client; it must not
    block.
    """

    def __init__(
        self,
        codec: str,
        dtype: torch.dtype,
        kept: ReplayLog,
        open_link: OpenLink,
        report: Callable[[Message], None],
        meters: Meters,
    ) -> None:
        self.kept = kept
        self._codec = codec
        self._dtype = dtype
        self._open_link = open_link
        self._report = report
        self._meters = meters
        # The stream to which results go, once its other end has got what it lacked.
        self._link: Stream | None = None
        # The step up to which the next hop was complete when its link began. It is sent replays only if that is 0.
        self._taken = 0
        # Results that came while the next hop was being sent what it lacked; and how many came while there was no next
        # hop.
        self._late: deque[Sent] | None = None
        self._without_link = 0
        # The route in use, and a newer one that is being set up: a bridge goes on until the link is up.
        self._route = trio.CancelScope()
        self._newest = trio.CancelScope()
        self._standing = trio.Event()

    def __repr__(self) -> str:
        return f"<Downstream {self._link or 'no link'} unsent={self.unsent}>"

    @property
    def unsent(self) -> int:
        """How many results are not yet on the wire."""
        return self._without_link if self._link is None else self._link.unsent_messages

    async def wait_unsent_at_most(self, count: int) -> None:
        """Wait until at most `count` results are unsent. Returns early if the link goes down."""
        while self._link is None:
            if self.unsent <= count:
                return
            await self._standing.wait()
        try:
            await self._link.wait_unsent_below(count + 1)
        except (PeerFault, trio.ClosedResourceError):
            return

    def push(self, step: Step, hidden: torch.Tensor) -> None:
        """Keep one result, `[positions, width]`, and queue it for the next hop. Never blocks. Raises BadResult."""
        self.kept.add(step, hidden)
        if self._link is not None:
            # The task that follows the link reports its end.
            with suppress(PeerFault, trio.ClosedResourceError):
                self._send_nowait(self._link, step, hidden)
            return
        # Encoded here already, so that a result that does not fit the codec is still refused to the client.
        encoded(step, hidden, self._codec, self._dtype)
        self._without_link += step.seq != REPLAY_SEQ
        if self._late is not None:
            self._late.append((step, hidden))

    async def follow(self, epoch: int, next_hop: NextHop, *, asked: bool) -> None:
        """Open the link of a route, and stay until it ends or another route supersedes it.

        `asked`: the client requested this route, and gets a message once it is up.
        """
        with self._routed(epoch) as scope:
            async with self._open_link(next_hop) as (link, linked):
                self._take_over(scope)
                replayed = await self._use(link, linked.taken, epoch)
                if asked:
                    self._report(Routed(epoch=epoch, replayed=replayed))
                try:
                    # The next hop sends only one more message, with the reason why it ends the link.
                    reply = parse((await link.receive()).header, (Failure,))
                except trio.EndOfChannel:
                    raise LinkFailed("the next hop ended the link") from None
                finally:
                    if self._link is link:
                        self._unlink()
                raise LinkFailed(f"the next hop ended the link: {reply.error}")

    async def bridge(self, epoch: int, control: Stream, taken: int) -> None:
        """Push results to the client, which passes them on to a next hop that took the steps up to `taken`."""
        with self._routed(epoch) as scope:
            self._take_over(scope)
            replayed = await self._use(control, taken, epoch)
            self._report(Routed(epoch=epoch, replayed=replayed))
            # The handler of the control stream notices when it ends. A newer route cancels the bridge.
            await trio.sleep_forever()

    async def copy(self, epoch: int, next_hop: NextHop) -> None:
        """Send another hop, over a link of its own, what the next hop was sent so far. Says nothing if that fails: the
        client sees at the other hop what came.
        """
        with suppress(LinkFailed, PeerFault, CallerError, trio.ClosedResourceError), trio.move_on_after(COPY_S):
            async with self._open_link(next_hop) as (link, _):
                with self.kept.pinned():
                    for step, hidden in self.kept.since(0, epoch):
                        await self._encode_and_send(link, step, hidden)
                await link.wait_drained()

    @contextmanager
    def _routed(self, epoch: int) -> Iterator[trio.CancelScope]:
        """Cancel the previous route that is being set up, run this one, and report how it ends."""
        self._newest.cancel()
        with trio.CancelScope() as self._newest:
            try:
                yield self._newest
            except AlreadyFolded:
                self._report(Gap(epoch=epoch, seq=self.kept.folded, have=()))
            # A CallerError here means that what was kept for the replay does not fit the codec.
            except (LinkFailed, PeerFault, CallerError, trio.ClosedResourceError) as error:
                self._report(LinkDown(epoch=epoch, message=str(error)[:500]))

    def _take_over(self, scope: trio.CancelScope) -> None:
        """End the old route: the newest one is up."""
        self._route.cancel()
        self._route = scope
        self._newest = trio.CancelScope()
        self._unlink()

    async def _use(self, link: Stream, taken: int, epoch: int) -> int:
        """Send the next hop what it lacks, and then let results go there. Returns how many positions were replayed."""
        self._taken = taken
        late: deque[Sent] = deque()
        self._late = late
        replayed = 0
        try:
            with self.kept.pinned():
                for step, hidden in self.kept.since(taken, epoch):
                    await self._send(link, step, hidden)
                    replayed += step.positions
            while late:
                await self._send(link, *late.popleft())
        finally:
            if self._late is late:
                self._late = None
        self._link = link
        self._without_link = 0
        self._standing.set()
        return replayed

    async def _send(self, link: Stream, step: Step, hidden: torch.Tensor) -> None:
        if self._is_lacking(step):
            await self._encode_and_send(link, step, hidden)

    async def _encode_and_send(self, link: Stream, step: Step, hidden: torch.Tensor) -> None:
        header, body = encoded(step, hidden, self._codec, self._dtype)
        self._meters.sent(self._codec, body)
        await link.send(header, body, priority=priority_of(step.positions))

    def _send_nowait(self, link: Stream, step: Step, hidden: torch.Tensor) -> None:
        if self._is_lacking(step):
            header, body = encoded(step, hidden, self._codec, self._dtype)
            self._meters.sent(self._codec, body)
            link.send_nowait(header, body, priority=priority_of(step.positions))

    def _is_lacking(self, step: Step) -> bool:
        return step.seq > self._taken or (step.seq == REPLAY_SEQ and not self._taken)

    def _unlink(self) -> None:
        if self._link is not None:
            self._link = None
            self._standing = trio.Event()

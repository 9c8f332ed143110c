"""One client's session at one hop: takes steps for the engine, and hands the results to the `Outlet`.

Here are the rules of numbers and back-pressure (spec/sessions/session.md). A step may come twice, by two
routes, and the next hop may be slow, frozen or absent. So a step's number is taken once, whichever peer brings it.
Results never wait for a stream: they are queued on it, and a session with too many unsent results is left out of the
next batches.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import torch
import trio

from peerd.compute.errors import StepGapError
from peerd.exchange.replay_log import ReplayLog
from peerd.exchange.step_tensors import header_of
from peerd.net.connections import Stream
from peerd.net.limits.owners import Owner
from peerd.protocol.encoding.tensors import DTYPES, MAX_EXACT_VALUE_BYTES, decode_tensor
from peerd.protocol.errors import (
    CallerError,
    Draining,
    Evicted,
    InvalidRequest,
    PeerdError,
    RemoteProtocolError,
    Superseded,
)
from peerd.protocol.messages.adapters import Upload
from peerd.protocol.messages.audits import Copy
from peerd.protocol.messages.drawing import HEAD, Draw, Sampling
from peerd.protocol.messages.session import (
    MAX_STEP_POSITIONS,
    REPLAY_SEQ,
    Bridge,
    Failure,
    Gap,
    Opened,
    OpenSession,
    Progress,
    Route,
    Step,
)
from peerd.protocol.rows import LEAST_PREFILL_POSITIONS
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import AdapterRoom
from peerd.server.served_head import ServedHead
from peerd.server.sessions.acknowledged import RECEIPT_EVERY, Acknowledged
from peerd.server.sessions.answering import Answering
from peerd.server.sessions.downstream import Downstream, OpenLink
from peerd.server.sessions.drawing import Drawing
from peerd.server.sessions.outlet import Outlet
from peerd.server.sessions.own_adapter import OwnAdapter
from peerd.server.sessions.sketching import Sketching

# With more unsent results than this, the session waits. One on the wire and one behind it keep a link busy.
MAX_UNSENT_RESULTS = 2
# A hop queues no more steps than this, even for a client with a deeper pipeline (`open` may ask for up to 64).
MAX_GRANTED_STEPS = 16
# An audit asks for two copies, and few sessions are audited; each copy costs as much as a replay.
MAX_COPIES = 8


class HostedSession:
    """One hop of a session. `run` owns its tasks; the handlers of its streams feed it."""

    def __init__(
        self,
        opening: OpenSession,
        owner: Owner,
        engine: EngineTask,
        open_link: OpenLink,
        adapter_room: AdapterRoom | None = None,
        receipts: Acknowledged | None = None,
        head: ServedHead | None = None,
    ) -> None:
        self.opening = opening
        #: What the client has acknowledged; None if we want no receipts.
        self.receipts = receipts
        self.owner = owner
        # The epoch of the link from the upstream hop. That of the route to the next hop is in `_outlet`: a client may
        # change either alone.
        self._link_epoch = opening.epoch
        # The last step that was taken, and the last whose result was sent on.
        self.taken = 0
        self.done = 0
        self.max_steps = min(opening.max_steps, MAX_GRANTED_STEPS)
        # When the client last sent something, or last received something.
        self.last_used = trio.current_time()
        self.admitted = False
        self.client = Answering(opening, self.close, engine.meter.meters)
        self._copies = 0
        self._engine = engine
        self._adapter = OwnAdapter(opening, owner, adapter_room or AdapterRoom())
        self._dtype = DTYPES[opening.dtype]
        self._sketching: Sketching | None = None
        if opening.sketch:
            self._sketching = Sketching(opening, engine.engine.hidden_size, self._dtype, self.client.tell_sketch)
        kept = ReplayLog(opening.max_length, max_positions=opening.size.positions)
        down = Downstream(opening.codec, self._dtype, kept, open_link, self.client.report, engine.meter.meters)
        self._drawing = Drawing(head, opening, self.client) if head is not None and HEAD in opening.needs else None
        self._outlet = Outlet(opening, self._drawing or self.client, down, self.max_steps)
        # Steps submitted to the engine, oldest first.
        self._pending: deque[Step] = deque()
        self._upstream = trio.CancelScope()
        self._attended = trio.CancelScope()
        self._held = False
        self._moved = trio.lowlevel.ParkingLot()
        self._closed = trio.Event()

    def __repr__(self) -> str:
        return (
            f"<HostedSession {self.opening.session.hex()[:8]} hop={self.opening.hop} epoch={self._outlet.epoch}"
            f" pending={len(self._pending)} of {self.owner.peer_id}>"
        )

    @property
    def tokens(self) -> int:
        """The KV tokens that the session holds."""
        return self._engine.tokens_of(self)

    @property
    def max_positions(self) -> int:
        """How many positions one of its steps may bring: twice what it can hold, so that a step that is slightly too
        long is refused with the fitting error.
        """
        return min(MAX_STEP_POSITIONS, 2 * self.opening.size.positions)

    def unused_s(self) -> float:
        """For how many seconds the session has made no progress for which others would have to wait; 0 while it is in
        use.

        A session whose results nobody reads is not in use, however many steps it has.
        """
        is_drawn_from = self._drawing is not None and self._drawing.is_working
        is_worked_on = (self._pending and not self._held) or self._adapter.is_coming or is_drawn_from
        return 0.0 if is_worked_on else trio.current_time() - self.last_used

    @property
    def has_begun(self) -> bool:
        """Whether a step was ever taken."""
        return self.taken > 0 or (self.admitted and bool(self._engine.engine.lengths(self)))

    @property
    def task(self) -> EngineTask:
        """The task of the engine that it uses."""
        return self._engine

    @property
    def max_body(self) -> int:
        """How many bytes a step may bring: twice what the session holds, so that a step that is slightly too long is
        refused with the fitting error.
        """
        # The rest of a step's body is smaller than its tensor.
        return self.max_positions * self._engine.engine.hidden_size * MAX_EXACT_VALUE_BYTES

    async def admit(self) -> None:
        """Commit KV, waiting for memory as long as the client allows. Raises NoRoom, ContextTooLong, Draining."""
        with self._attended:
            await self._engine.open(self, self.owner, self.opening, self.deliver)
        if self._attended.cancelled_caught:
            raise Draining("this peer is about to stop serving these blocks")
        self.admitted = True
        self.last_used = trio.current_time()

    def release(self) -> None:
        """Free the KV. Messages that its streams still bring are refused."""
        self.admitted = False
        self._engine.close(self)
        self._adapter.release()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the route, and hold the session back while results pile up, until `close`."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            task_status.started()
            if self.opening.next is not None:
                nursery.start_soon(self._outlet.follow, self.opening.epoch, self.opening.next, False)
            nursery.start_soon(self._hold_back)
            if self._drawing is not None:
                nursery.start_soon(self._drawing.run)
            await self._closed.wait()
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """End the session: `run` returns, its links end, and its control stream is no longer served."""
        self._closed.set()
        self._upstream.cancel()
        self._attended.cancel()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    # Messages from the client.

    def attach(self, control: Stream) -> trio.CancelScope:
        """Answer on this control stream from now on. The returned scope is cancelled when the session ends. Raises
        Evicted.
        """
        if not self.admitted:
            raise Evicted("the session has ended")
        self._attended = trio.CancelScope()
        have = tuple(sorted(self._engine.engine.lengths(self).items()))
        self.client.attach(control, self._opened(have))
        if self._closed.is_set():
            self._attended.cancel()
        return self._attended

    def _opened(self, have: tuple[tuple[int, int], ...]) -> Opened:
        every = RECEIPT_EVERY if self.receipts is not None else 0
        return Opened(
            epoch=self._outlet.epoch,
            max_steps=self.max_steps,
            have=have,
            receipt_every=every,
            step_positions=self._step_positions,
        )

    @property
    def _step_positions(self) -> int:
        """How long the steps of a prompt should be: two fill a batch, so that one travels while one is computed."""
        half = self._engine.engine.batch_tokens // 2
        return min(MAX_STEP_POSITIONS, max(LEAST_PREFILL_POSITIONS, half))

    def acknowledge(self, signed: bytes) -> None:
        """Count a receipt of the client's. Raises RemoteProtocolError."""
        if self.receipts is None:
            raise RemoteProtocolError("a receipt that was not asked for")
        self.receipts.take(signed)

    def route(self, route: Route) -> None:
        """Push to another next hop from now on. Raises Superseded unless the epoch is new."""
        self._outlet.begin(route, has_begun=self.has_begun)
        if route.next is not None:
            self._tasks.start_soon(self._outlet.follow, route.epoch, route.next, True)
        self._moved.unpark_all()

    def bridge(self, bridge: Bridge) -> None:
        """Push results to the client, which passes them on, from now on. Raises Superseded unless the epoch is new."""
        self._outlet.begin(bridge, has_begun=self.has_begun)
        control = self.client.control
        if control is not None:
            self._tasks.start_soon(self._outlet.bridge, bridge, control)
        self._moved.unpark_all()

    def copy(self, copy: Copy) -> None:
        """Send the rows to another hop too, which checks the next one. Raises RemoteProtocolError beyond MAX_COPIES."""
        self._copies += 1
        if self._copies > MAX_COPIES:
            raise RemoteProtocolError(f"{self._copies} copies of one session")
        if self._outlet.is_last:
            raise InvalidRequest("a last hop keeps no results that it could send again")
        self._tasks.start_soon(self._outlet.copy, copy)

    @property
    def progress(self) -> Progress:
        """How far the session is."""
        unanswered = None if self._drawing is None else self._drawing.unanswered
        done = self.done if unanswered is None else min(self.done, unanswered - 1)
        return Progress(taken=self.taken, done=done, turns=self._engine.turns)

    def draw(self, message: Sampling | Draw, body: memoryview) -> None:
        """Take what the client says of how tokens are drawn. Raises RemoteProtocolError."""
        if self._drawing is None:
            raise RemoteProtocolError(f"{message.TYPE} for a hop that draws no tokens")
        self._drawing.take(message, body)

    def accept_from_client(self, step: Step, body: memoryview) -> None:
        """Queue a step from the control stream. Raises RemoteProtocolError if the client sends too many."""
        # After a replay, which may still be queued, come its last step and all steps without an answer.
        if len(self._pending) > 2 * self.max_steps:
            raise RemoteProtocolError(f"more than the {self.max_steps} unanswered steps that were granted")
        self.accept(step, body)

    async def take_adapter(self, stream: Stream, upload: Upload) -> None:
        """Receive the client's own adapter. Raises CallerError, Overloaded or PeerFault; then the client may send it
        again.
        """
        self._adapter.check_awaited()
        try:
            await self._adapter.take(stream, upload, partial(self._engine.give_adapter, self))
        finally:
            self.last_used = trio.current_time()

    # Messages from the client or the upstream hop.

    def accept(self, step: Step, body: memoryview) -> None:
        """Queue a step for the engine, or tell the client why it is refused. Raises RemoteProtocolError, Evicted."""
        if not self.admitted:
            raise Evicted("the session has ended")
        if REPLAY_SEQ < step.seq <= self.taken:
            # It came before, by another route, so its result was sent on or will be.
            return
        self.last_used = trio.current_time()
        try:
            if self._adapter.is_missing:
                raise InvalidRequest("a step came before the adapter that this session needs")
            hidden = self._decode(step, body)
            self._engine.submit(self, step, hidden)
        except StepGapError as gap:
            self.client.tell(Gap(epoch=step.epoch, seq=step.seq, have=tuple(sorted(gap.have.items()))))
        except CallerError as error:
            self.client.tell(Failure.of(error, step.seq))
        else:
            self._pending.append(step)
            self.taken = max(self.taken, step.seq)
            if self._sketching is not None:
                self._sketching.received(step, hidden)

    def take_over(self, epoch: int) -> trio.CancelScope:
        """Begin a link with this epoch's ticket, and end the one before. Raises Superseded, Evicted."""
        if not self.admitted:
            raise Evicted("the session has ended")
        if epoch < self._link_epoch:
            raise Superseded(f"the session has a link of epoch {self._link_epoch}, the ticket says {epoch}")
        self._upstream.cancel()
        self._upstream = trio.CancelScope()
        self._link_epoch = epoch
        return self._upstream

    async def wait_for_room(self) -> None:
        """Wait until fewer steps are queued than were granted. Meanwhile the link gets no credit."""
        while len(self._pending) >= self.max_steps:
            await self._moved.park()

    # Results from the engine.

    def deliver(self, result: torch.Tensor | PeerdError) -> None:
        """Send a step's result to the next hop or the client. The engine task calls it; it never blocks."""
        step = self._pending.popleft()
        self.last_used = trio.current_time()
        try:
            if isinstance(result, PeerdError):
                raise result
            if self.receipts is not None:
                self.receipts.computed += step.positions
            if self._sketching is not None:
                self._sketching.computed(step, result)
            self._outlet.send(step, result)
        except PeerdError as error:
            self.client.tell(Failure.of(error, step.seq))
        self.done = max(self.done, step.seq)
        if self._outlet.unsent > MAX_UNSENT_RESULTS:
            self._held = True
            self._engine.hold(self, True)
        self._moved.unpark_all()

    def _decode(self, step: Step, body: memoryview) -> torch.Tensor:
        width = self._engine.engine.hidden_size
        header = header_of(step, width)
        if header is None:
            return torch.empty((0, width), dtype=self._dtype)
        self._engine.meter.meters.received(header.codec, body)
        return decode_tensor(header, body)

    async def _hold_back(self) -> None:
        """Let a held session run again as soon as its results are sent."""
        while True:
            if not self._held:
                await self._moved.park()
                continue
            await self._outlet.wait_unsent_at_most(MAX_UNSENT_RESULTS)
            self._held = False
            self._engine.hold(self, False)

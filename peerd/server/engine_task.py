"""The task that owns one device: it runs batches in a worker thread, and gives the results to sessions.

All tensors of a span belong to that thread; everything else here runs between two batches, in the Trio thread. A batch
that has begun is not interrupted: closing waits for it, and the engine's token budget limits how long. Here the
engine's errors become errors of the wire.

Between two batches the thread does other work: calls for which sessions can wait (`run_blocking`) and, with lower
priority than inference, turns of training (`run_work`; `device_queue.py` decides who gets which share).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import outcome
import torch
import trio

from peerd.compute.adapters.lora import Lora
from peerd.compute.device.failures import is_device_lost, is_out_of_memory
from peerd.compute.engine.batch_parts import run_in_parts
from peerd.compute.engine.engine import BaseEngine
from peerd.compute.errors import AdapterError, EngineError, NonFiniteError
from peerd.compute.steps import Batch, BatchOutput, EngineStep, StepResult
from peerd.meters import Meters
from peerd.net.containment import Containment
from peerd.net.limits.owners import Owner
from peerd.protocol.errors import (
    BadResult,
    ContextTooLong,
    Evicted,
    InternalError,
    InvalidRequest,
    NoRoom,
    PeerdError,
    UnsupportedFeature,
)
from peerd.protocol.messages.session import OpenSession, Step
from peerd.protocol.span import Span
from peerd.server.admission import Admission
from peerd.server.busy_meter import BusyMeter
from peerd.server.device_health import DeviceHealth
from peerd.server.device_queue import Job, Work, WorkQueue, run_slice
from peerd.server.device_thread import DeviceThread, RunBatch
from peerd.server.engine_adapters import EngineAdapters
from peerd.server.step_meter import StepMeter
from peerd.server.wire_errors import wire_errors
from peerd.trio_tools import tell

log = logging.getLogger(__name__)

T = TypeVar("T")
Deliver = Callable[["torch.Tensor | PeerdError"], None]
"""Takes a step's result, `[positions, hidden_size]` on the CPU, or the error of the step."""


@dataclass(frozen=True, slots=True)
class _Tenant:
    owner: Owner
    tokens: int
    deliver: Deliver
    adapter: str
    #: How many positions' outputs the hop may keep for the session.
    kept: int


# A hop that is not the last keeps all of a session's outputs in the host's memory. A server's host memory is computed
# by KV tokens (`Budget.host_per_token`): three copies of a position's activations, one of which is in transit. A
# session commits one KV token a position or, with windows, fewer; then this limit is reached first.
OUTPUTS_A_TOKEN = 2


class EngineTask:
    """One engine, its device thread, and the sessions that wait for its results.

    `run_batch` runs the engine's blocking part; the default hands it to a worker thread. With a `run_batch` nothing
    else needs a thread either (an engine without a device): `run_blocking` runs where it is called. `is_strict`: raise
    every failure except those for lack of memory; None takes PEERD_STRICT from the environment.
    """

    def __init__(self, engine: BaseEngine, *, run_batch: RunBatch | None = None, is_strict: bool | None = None) -> None:
        self.engine = engine
        #: Whether the device still computes. If it does not, the span must be given up.
        self.health = DeviceHealth()
        #: Functions to call when the device computes no more.
        self.on_broken: list[Callable[[], None]] = []
        #: Functions to call when steps begin to wait because the pool has no pages left.
        self.on_short: list[Callable[[], None]] = []
        #: Since when some have waited; None if none does.
        self.short_since: float | None = None
        self._containment = Containment(is_strict)
        self.busy = BusyMeter()
        #: Measures steps and batches; the server that serves this span replaces it by one for its own figures.
        self.meter = StepMeter(Meters())
        # How many turns the device has ended: a client that waits sees from it that the device works.
        self.turns = 0
        self.admission = Admission(engine.total_tokens, lambda: engine.free_tokens)
        self._free_to_keep = self._total_to_keep = OUTPUTS_A_TOKEN * engine.total_tokens
        #: The thread that owns the span's tensors.
        self.device = DeviceThread(run_batch)
        self._tenants: dict[Hashable, _Tenant] = {}
        self._adapters = EngineAdapters(engine)
        self._jobs = WorkQueue()
        self._work = trio.Event()
        #: The share of the device's time that may be used; what is left belongs to other programs.
        self.share = 1.0

    def __repr__(self) -> str:
        return f"<EngineTask {self.engine.span} sessions={len(self._tenants)} free={self.engine.free_tokens}>"

    async def run(self) -> None:
        """Run batches and turns of works until cancelled."""
        while True:
            began = trio.current_time()
            if await self._run_one():
                self.turns += 1
                if self.share < 1:
                    await trio.sleep((trio.current_time() - began) * (1 / self.share - 1))
            else:
                self._work = trio.Event()
                await self._work.wait()

    def note_turn(self) -> None:
        """Count a turn that other parts of the span's device have ended: a client that waits sees that it works."""
        self.turns += 1

    async def run_blocking(self, work: Callable[[], T]) -> T:
        """Run `work` on the device thread between two batches, where it may use the span's tensors.

        Callers get the device in order of arrival, so batches wait for at most one such call. If cancelled, this
        returns only when `work` has ended.
        """
        async with self.device.lock:
            return await self.device.call(work)

    def tokens_of(self, session: Hashable) -> int:
        """The KV tokens that the session is expected to need; 0 if it is not open."""
        tenant = self._tenants.get(session)
        return tenant.tokens if tenant is not None else 0

    @property
    def tenants(self) -> list[Hashable]:
        """The open sessions, the eldest first."""
        return list(self._tenants)

    async def run_work(self, owner: Hashable, work: Work) -> None:
        """Run a long work in turns, below inference and fairly among owners. Raises the errors of its turns.

        Raises Overloaded if too much waits already. If cancelled, the work gets no further turn.
        """
        job = self._jobs.add(owner, work)
        self._work.set()
        try:
            await job.done.wait()
        finally:
            self._jobs.leave(job)
        assert job.result is not None
        try:
            job.result.unwrap()
        except EngineError:
            raise
        except Exception as error:
            if not self._contains(error):
                raise
            raise await self._failed_work(error) from None

    async def _failed_work(self, error: Exception) -> PeerdError:
        """The error for the caller of a work that the device could not do."""
        if is_out_of_memory(error):
            async with self.device.lock:
                await self.device.call(self.engine.give_back)
            return NoRoom("there is no memory for this pass now")
        log.error("a turn of training failed on blocks %s", self.engine.span, exc_info=error)
        if is_device_lost(error):
            self.break_down("its device computes nothing more for this process")
        return InternalError("the pass could not be computed here")

    async def _run_one(self) -> bool:
        """Run a turn of a work, or plan, run and collect one batch. Returns False if there is nothing to run."""
        async with self.device.lock:
            if self._adapters.are_unused:
                await self._unload_unused()
                return True
            job = self._jobs.due(inference_ready=self.engine.ready())
            if job is not None:
                await self._run_turn(job)
                return True
            batch = self.engine.plan()
            self._note_short()
            if batch is None:
                return False
            began = trio.current_time()
            output = await self.device.run_batch(self._run_in_parts, batch)
            ended = trio.current_time()
            self._jobs.spent_on_inference(ended - began)
            self.busy.ran(began, ended)
            self.meter.ran(batch, began, ended)
            await self._judge(batch, output)
            for result in self.engine.collect(batch, output):
                self._hand_over(result)
            for session in {piece.step.session for piece in batch.pieces}:
                self._recount(session)
        # Pages of sessions that closed while the batch ran become free only now.
        self.admission.retry()
        return True

    def _note_short(self) -> None:
        if not self.engine.short:
            self.short_since = None
        elif self.short_since is None:
            self.short_since = trio.current_time()
            tell(self.on_short)

    def _recount(self, session: Hashable) -> None:
        """Count a session that has grown with what it is expected to need now."""
        tenant = self._tenants.get(session)
        if tenant is not None and (tokens := self.engine.tokens_of(session)) != tenant.tokens:
            self.admission.recount(tenant.owner, tokens - tenant.tokens)
            self._tenants[session] = replace(tenant, tokens=tokens)

    def _run_in_parts(self, batch: Batch) -> BatchOutput:
        return run_in_parts(self.engine.run, batch, self.engine.give_back, self._contains)

    def _contains(self, error: Exception) -> bool:
        return not self._containment.is_strict or is_out_of_memory(error)

    async def _judge(self, batch: Batch, output: BatchOutput) -> None:
        """Decide from a finished batch whether the device still computes."""
        was_broken = bool(self.health.broken)
        if was_broken:
            return
        tenants = [self._tenants.get(piece.step.session) for piece in batch.pieces]
        owners = {tenant.owner.share for tenant in tenants if tenant is not None}
        if self.health.note(output, owners):
            self.health.tested(await self.device.call(self.engine.works))
        if self.health.broken:
            tell(self.on_broken)

    def break_down(self, why: str) -> None:
        """Give the device up."""
        if not self.health.broken:
            self.health.broken = why
            tell(self.on_broken)

    async def _run_turn(self, job: Job) -> None:
        began = trio.current_time()
        result = await self.device.run_batch(run_slice, job.work)
        self._jobs.spent_on_job(trio.current_time() - began)
        self.busy.ran(began, trio.current_time())
        if isinstance(result, outcome.Error):
            job.end(result)
        elif result.value:
            job.end(outcome.Value(None))

    @property
    def adapters(self) -> frozenset[str]:
        """The adapters that new sessions may ask for."""
        return self._adapters.offered

    async def load_adapter(self, name: str, lora: Lora) -> None:
        """Load an adapter between two batches. Raises AdapterError if it does not fit."""
        await self.run_blocking(partial(self.engine.load_adapter, name, lora))

    def withdraw_adapter(self, name: str) -> None:
        """Offer the adapter to no new session, and unload it after its last session. Raises KeyError if it is
        unknown.
        """
        self._adapters.withdraw(name)
        self._wake_to_unload()

    async def give_adapter(self, session: Hashable, lora: Lora) -> None:
        """Put an open session that has not begun under its client's own adapter, which is unloaded with the session.

        Raises InvalidRequest if the adapter does not fit, and Evicted if the session has ended meanwhile.
        """
        name = self._adapters.new_private_name()
        try:
            await self.load_adapter(name, lora)
        except AdapterError as error:
            raise InvalidRequest(str(error)) from error
        tenant = self._tenants.get(session)
        if tenant is not None:
            self._tenants[session] = replace(tenant, adapter=name)
            with wire_errors():
                self.engine.use_adapter(session, name)
        else:
            self._release_adapter(name)
            raise Evicted("the session has ended")

    def _release_adapter(self, name: str) -> None:
        self._adapters.released(name)
        self._wake_to_unload()

    def _wake_to_unload(self) -> None:
        if self._adapters.are_unused:
            self._work.set()

    async def _unload_unused(self) -> None:
        for name in self._adapters.take_unused():
            await self.device.call(partial(self.engine.unload_adapter, name))
            self._adapters.unloaded(name)

    async def open(self, session: Hashable, owner: Owner, opening: OpenSession, deliver: Deliver) -> None:
        """Open a session in the engine, and commit memory for outputs if there is a next hop.

        Waits for memory as long as `opening` allows. Raises NoRoom, ContextTooLong, InvalidRequest, and
        UnsupportedFeature for an unknown adapter.
        """
        if opening.adapter and opening.adapter not in self.adapters:
            there = ", ".join(sorted(self.adapters)) or "none"
            raise UnsupportedFeature(f"this peer has no adapter {opening.adapter!r}; it has {there}")
        blocks, size = Span(opening.start, opening.end), opening.size
        kept = size.positions if opening.next is not None else 0
        if kept > self._total_to_keep:
            raise ContextTooLong(
                f"{kept} positions of outputs to keep exceed this peer's {self._total_to_keep}: ask for fewer rows or"
                " positions at once"
            )

        def attempt() -> None:
            if kept > self._free_to_keep:
                message = f"{kept} positions of outputs to keep wanted, there is memory for {self._free_to_keep}"
                raise NoRoom(message, self.engine.free_tokens)
            with wire_errors():
                self.engine.open(
                    session,
                    size,
                    blocks=blocks,
                    owner=owner.share,
                    weight=owner.weight,
                    adapter=opening.adapter,
                )
            self._free_to_keep -= kept

        def undo() -> None:
            self.engine.close(session)
            self._free_to_keep += kept

        tokens = self.engine.tokens_wanted(size)
        await self.admission.admit(owner, tokens, attempt, opening.timeout_ms / 1000, undo)
        self._tenants[session] = _Tenant(owner, tokens, deliver, opening.adapter, kept)

    def submit(self, session: Hashable, step: Step, hidden: torch.Tensor) -> None:
        """Queue a step. Raises StepGapError, ContextTooLong, InvalidRequest, and then changes nothing."""
        with wire_errors():
            self.engine.submit(EngineStep(session, step.seq, step.ops, step.rows, hidden))
        self.meter.queued(session, step.seq)
        self._work.set()

    def hold(self, session: Hashable, held: bool) -> None:
        """Set whether the session is left out of batches, because too many of its results are unsent."""
        self.engine.hold(session, held)
        if not held:
            self._work.set()

    def close(self, session: Hashable) -> None:
        """Free what the session holds, and admit waiting sessions that now fit."""
        tenant = self._tenants.pop(session)
        self.meter.left(session)
        self.engine.close(session)
        self._free_to_keep += tenant.kept
        if self.short_since is not None:
            self._work.set()
        self.admission.release(tenant.owner, tenant.tokens)
        self._release_adapter(tenant.adapter)

    def _hand_over(self, result: StepResult) -> None:
        self.meter.ended(result)
        tenant = self._tenants.get(result.session)
        if tenant is None:
            return
        # A bug in one session must not cost the others of its batch their results.
        with self._containment.around("handing over a result", tenant.owner.peer_id):
            self._deliver(tenant, result)

    def _deliver(self, tenant: _Tenant, result: StepResult) -> None:
        if result.hidden is not None:
            tenant.deliver(result.hidden)
        elif isinstance(result.error, NonFiniteError):
            self.health.note_bad_result(result.error)
            tenant.deliver(BadResult(str(result.error)))
        else:
            tenant.deliver(InternalError(str(result.error)))

"""Hosts the spans of one peer: has them chosen, loaded, served, announced and moved (`Peer.serve`).

The steps themselves are elsewhere: `loading.py`, `first_choice.py`, `mover.py`, `server/`. The swarm must know of a
span from the moment when it is chosen until it is gone, and must not keep seeing one that failed to load. So each span
has a slot from the beginning, which is released if anything fails.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import trio

from peerd.checkpoints import Checkpoints
from peerd.discovery.discovery import Discovery
from peerd.net.connections import Connections
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.adapters import name_of
from peerd.protocol.span import Span
from peerd.routing.chains.rules import ChainRules
from peerd.spans.announcements import Announcements
from peerd.spans.catalogue import words_for
from peerd.spans.slots import Slot, Slots
from peerd.trio_tools import import_in_thread

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.protocol.records.envelope import ModelRecord
    from peerd.server.served_spans import ServedSpan
    from peerd.server.server import Server
    from peerd.spans.loading import SpanLoader
    from peerd.spans.mover import Rebalancer
    from peerd.spans.spec import ServeSpec
    from peerd.spans.swap import Reloader, SpanSwap
    from peerd.spans.trainable import TrainableSpans

# How long a server waits until it is announced; then it goes on even if no peer answers.
ANNOUNCE_WAIT_S = 2.0


class SpanHost:
    """The spans of one peer. `tasks` owns the tasks beside them; `rules` limit the peers whose distance is
    announced.
    """

    def __init__(
        self,
        peer_id: PeerId,
        connections: Connections,
        discovery: Discovery,
        server: Server,
        checkpoints: Checkpoints,
        tasks: trio.Nursery,
        rules: ChainRules | None = None,
    ) -> None:
        self._peer_id = peer_id
        self._connections = connections
        self._discovery = discovery
        self._server = server
        self._checkpoints = checkpoints
        self._tasks = tasks
        self._slots = Slots(server, discovery.announce_soon)
        self._announcements = Announcements(peer_id, connections, discovery, self._slots, rules or ChainRules())
        # Whether discovery asks for the announcements, and whether tasks keep them true.
        self._is_announcing = self._is_measuring = False
        # What loads spans while we serve.
        self._movers: list[Rebalancer | Reloader] = []
        self._reloaders: dict[Slot, Reloader] = {}
        # What opens copies of our spans for training; None while nobody may train.
        self._copies: TrainableSpans | None = None

    def __repr__(self) -> str:
        return f"<SpanHost {' '.join(str(served.span) for served in self._server.spans)}>"

    async def drain(self, timeout_s: float) -> None:
        """Announce that we leave, refuse new sessions, and wait at most `timeout_s` for the others to end."""
        for mover in self._movers:
            mover.stop()
        self._server.draining = True
        self._discovery.announce_soon()
        await self._server.drain(timeout_s)

    async def pause(self, timeout_s: float) -> None:
        """Announce that the spans accept nothing new, and wait as `Server.pause` does. `resume` takes that back.

        Our own programs go on using them.
        """
        self._server.paused = True
        self._discovery.directory.open_to_us.add(self._peer_id)
        self._discovery.announce_soon()
        await self._server.pause(timeout_s)

    def resume(self) -> None:
        """Serve again after `pause`."""
        self._server.paused = False
        self._discovery.directory.open_to_us.discard(self._peer_id)
        self._discovery.announce_soon()

    async def serve(self, spec: ServeSpec) -> tuple[ServedSpan, ...]:
        """Serve blocks of a model from now on, where others find them: one span for each of the spec's devices.

        If the spec names one device and no span, and does not say `stay`, the span moves later to blocks where the
        swarm needs it more; `served` shows where. If the spec names no model, this waits until the swarm serves one
        that the spec allows. Raises CheckpointError, InvalidRequest.
        """
        await import_in_thread("peerd.spans.loading")
        from peerd.spans.loading import SpanLoader, fetch_served, load_served

        if not self._is_announcing:
            self._is_announcing = True
            self._discovery.announce_from(self._announcements.spans, self._announcements.models)
        spec = replace(spec, hub=self._checkpoints.settings)
        if spec.among:
            spec = await self._choose_model(spec)
        spec = replace(spec, promised_bytes=self._promised_bytes())
        reserved: list[Slot] = []
        ready = []
        try:
            async with self._checkpoints.open(spec.model, spec.revision) as checkpoint:
                shares = await self._choose(spec, checkpoint, reserved)
                await fetch_served(spec, checkpoint, Span(shares[0][1].start, shares[-1][1].end))
                for own, span in shares:
                    ready.append(await load_served(own, checkpoint, span))
                digest, block_count = checkpoint.model_digest, checkpoint.block_count
                words = words_for(checkpoint)
            moves = not (spec.stay or isinstance(spec.blocks, Span) or "," in spec.device)
            for (served, loaded), (own, span) in zip(ready, shares, strict=True):
                slot = reserved[0]
                self._slots.add(slot, served, loaded)
                reserved.remove(slot)
                slot.loader = SpanLoader(self._checkpoints, own, digest, self._promised_bytes)
                swap = self._start_reloading(slot, slot.loader)
                if moves and len(span) < block_count:
                    self._start_moving(slot, slot.loader, swap, block_count, spec.look_every_s)
            self._announce_model(words)
            if spec.trainable is not None:
                self._let_train()
        finally:
            for slot in reserved:
                self._slots.release(slot)
            self._discovery.announce_soon()
        with trio.move_on_after(ANNOUNCE_WAIT_S):
            await self._discovery.wait_announced()
        return tuple(served for served, _ in ready)

    async def withdraw(self, slot: Slot) -> None:
        """Stop serving the span in a slot, which does not move, and free the slot. It may be loading again now."""
        reloader = self._reloaders.pop(slot)
        reloader.stop()
        # A load that cannot be interrupted still fills the slot.
        async with reloader.swap.lock:
            if slot.served is not None:
                await self._server.withdraw(slot.served)
            self._movers.remove(reloader)
            self._slots.release(slot)
        self._discovery.announce_soon()

    def _let_train(self) -> None:
        from peerd.spans.trainable import TrainableSpans

        if self._copies is None:
            self._copies = TrainableSpans(self._slots, self.serve, self.withdraw)
            self._server.trainings.attach(self._copies.open)

    def _promised_bytes(self) -> int:
        """The host memory that the served spans may still take."""
        return sum(slot.loaded.promised_bytes for slot in self._slots if slot.loaded is not None)

    async def _choose_model(self, spec: ServeSpec) -> ServeSpec:
        """The spec with one of the models that it allows. Waits until the swarm serves one."""
        from peerd.spans.model_choice import ModelChoice

        return await ModelChoice(spec, self._discovery, self._checkpoints).choose()

    def _announce_model(self, words: ModelRecord) -> None:
        self._announcements.add_model(words)
        if not self._is_measuring:
            self._is_measuring = True
            self._keep("naming models", self._announcements.keep_names)
            self._keep("measuring the ways to next servers", self._announcements.measure)

    def _start_reloading(self, slot: Slot, loader: SpanLoader) -> SpanSwap:
        from peerd.spans.swap import Reloader, SpanSwap

        random, containment = Random(os.urandom(16)), self._connections.containment
        swap = SpanSwap(slot, loader, self._server, self._discovery, random, containment)
        reloader = Reloader(slot, swap, self._server, random)
        self._movers.append(reloader)
        self._reloaders[slot] = reloader
        self._keep("loading blocks again", reloader.run)
        return swap

    def _start_moving(
        self, slot: Slot, loader: SpanLoader, swap: SpanSwap, block_count: int, look_every_s: float | None
    ) -> None:
        from peerd.spans.mover import MoveTiming, Rebalancer

        random = Random(os.urandom(16))
        pace = MoveTiming.looking_every(look_every_s)
        rebalancer = Rebalancer(
            slot, loader, self._server, self._discovery, self._peer_id, block_count, random, pace, swap
        )
        self._movers.append(rebalancer)
        self._keep("moving blocks", rebalancer.run)

    def _keep(self, what: str, run: Callable[[], Awaitable[None]]) -> None:
        self._tasks.start_soon(partial(self._connections.containment.keep_running, run, what=what))

    async def load_adapter(self, served: ServedSpan, name: str, path: str | Path) -> str:
        """Serve one more LoRA adapter, a directory or hub id, while sessions run; returns its id.

        Raises AdapterError if it does not fit, or was trained for another model and the spec does not say `any_base`;
        InvalidRequest if no more adapters can be announced.
        """
        from peerd.spans.adapters import load_adapter, read_adapter

        slot = self._slots.of(served)
        assert slot.loaded is not None
        engine = slot.loaded.engine
        hub = self._checkpoints.settings
        any_base = slot.loader is not None and slot.loader.spec.any_base
        read = partial(
            read_adapter,
            name,
            path,
            slot.loaded.family,
            served.span,
            hub,
            model_digest=None if any_base else served.model,
        )
        adapter = await trio.to_thread.run_sync(read)
        await served.task.run_blocking(partial(load_adapter, engine, adapter))
        try:
            # The span may have moved meanwhile.
            self._slots.of(served).check()
        except InvalidRequest:
            served.task.withdraw_adapter(adapter.id)
            raise
        if slot.loader is not None:
            slot.loader.with_adapter(name, path)
        self._discovery.announce_soon()
        return adapter.id

    def unload_adapter(self, served: ServedSpan, adapter: str) -> None:
        """Offer an adapter (given by its id) to no new session, and free it after its last session. Raises KeyError."""
        slot = self._slots.of(served)
        served.task.withdraw_adapter(adapter)
        if slot.loader is not None:
            slot.loader.without_adapter(name_of(adapter))
        self._discovery.announce_soon()

    async def _choose(
        self, spec: ServeSpec, checkpoint: Checkpoint, reserved: list[Slot]
    ) -> list[tuple[ServeSpec, Span]]:
        """Choose the span that was asked for, or the one that the swarm needs most, and divide it among the spec's
        devices.

        From now on the shares are announced as intended: each has a slot of its own, which is added to `reserved`.
        """
        from peerd.compute.engine.capacity import fits_on_disk
        from peerd.spans.budget import how_many_blocks
        from peerd.spans.devices import rooms, share_span, specs_by_device
        from peerd.spans.first_choice import Choice, choose_first
        from peerd.spans.loading import expected_record

        # This hashes each weights file once: a server and its clients must mean the same model.
        digest = await trio.to_thread.run_sync(lambda: checkpoint.model_digest)
        specs = specs_by_device(spec)
        # How weights are stored may have to be measured once.
        expected = await trio.to_thread.run_sync(expected_record, specs[0], checkpoint)
        room = await trio.to_thread.run_sync(rooms, specs, checkpoint) if len(specs) > 1 else [1]
        reserved.append(self._slots.reserve(expected))
        if isinstance(spec.blocks, Span):
            if spec.blocks.end > checkpoint.block_count:
                raise InvalidRequest(f"{checkpoint.name} has blocks 0:{checkpoint.block_count}, not {spec.blocks}")
            span = spec.blocks
        else:
            if spec.blocks is None and len(specs) > 1:
                count = fits_on_disk(checkpoint, min(sum(room), checkpoint.block_count))
            else:
                count = await trio.to_thread.run_sync(how_many_blocks, spec, checkpoint)
            here = await trio.to_thread.run_sync(lambda: checkpoint.blocks_on_disk)
            choice = Choice(digest, checkpoint.block_count, count, here)
            span = await choose_first(choice, reserved[0], self._discovery, self._peer_id, Random(os.urandom(16)))
        shares = [(own, share) for own, share in zip(specs, share_span(span, room), strict=True) if share is not None]
        reserved += [self._slots.reserve(expected) for _ in shares[1:]]
        for slot, (_, share) in zip(reserved, shares, strict=True):
            slot.decide(share)
        self._discovery.announce_soon()
        return shares

"""Runs beside a server: looks at the machine, and has the peer pause while its owner uses it."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from peerd.cli.owner.decision import LOOK_S, Serving, Signs, after
from peerd.cli.owner.signs import Watch, gpus_of

log = logging.getLogger(__name__)

# As after SIGTERM: most answers end within it, and the others go on elsewhere.
DRAIN_S = 60.0


class Pausing(Protocol):
    """What can stop serving for a while: `Peer`."""

    async def pause(self, timeout_s: float) -> None: ...

    def resume(self) -> None: ...


@asynccontextmanager
async def yielding_to_owner(peer: Pausing, devices: Sequence[str] | None) -> AsyncIterator[None]:
    """Pause the peer whenever its machine is needed, until the block ends. devices: on which it serves; None: never."""
    if devices is None:
        yield
        return
    watch = await trio.to_thread.run_sync(Watch, gpus_of(devices, os.environ.get("CUDA_VISIBLE_DEVICES", "")))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(yield_to_owner, peer, watch.look)
        yield
        nursery.cancel_scope.cancel()


async def yield_to_owner(peer: Pausing, look: Callable[[], Signs]) -> None:
    """Pause the peer while other programs or users need the machine, until cancelled. `look` blocks."""
    serving = Serving()
    async with trio.open_nursery() as nursery:
        pausing = trio.CancelScope()
        while True:
            await trio.sleep(LOOK_S)
            signs = await trio.to_thread.run_sync(look, abandon_on_cancel=True)
            before, serving = serving, after(serving, signs, trio.current_time())
            if before.may_serve and not serving.may_serve:
                log.info("serving pauses: %s; open sessions have %g s to end here", serving.why, DRAIN_S)
                pausing = trio.CancelScope()
                nursery.start_soon(_pause, peer, pausing)
            elif serving.may_serve and not before.may_serve:
                pausing.cancel()
                peer.resume()
                log.info("serving again: nobody else uses this machine")


async def _pause(peer: Pausing, scope: trio.CancelScope) -> None:
    with scope:
        await peer.pause(DRAIN_S)
